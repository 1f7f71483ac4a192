// test(name, async function) registers; main() runs all, prints one line each, and lets none run for long.
'use strict'

const path = require('path')
const assert = require('assert')

const LIMIT = 60000
const tests = []

exports.assert = assert
exports.test = (name, run) => tests.push([name, run])

// A package from target/drivers/node, not from anywhere else.
exports.package = (name) => require(path.join(process.env.NODE_MODULES, name))

exports.main = async () => {
  const chosen = process.argv.slice(2)
  // What a driver throws outside of any promise belongs to the test that runs.
  let fail = () => {}
  process.on('uncaughtException', (error) => fail(error))
  process.on('unhandledRejection', (error) => fail(error))
  for (const [name, run] of tests) {
    if (chosen.length && !chosen.includes(name)) continue
    let timer
    const late = new Promise((_, reject) => {
      fail = reject
      timer = setTimeout(() => reject(new Error(`hangs: not over within ${LIMIT / 1000} s`)), LIMIT)
    })
    try {
      await Promise.race([run(), late])
      console.log(`ok ${name}`)
    } catch (error) {
      const where = (error.stack || '').split('\n').filter((line) => line.includes(process.argv[1])).slice(0, 2)
      console.log(`not ok ${name}: ${error.code || ''} ${error.message} ${where}`.replace(/\s+/g, ' ').slice(0, 400))
    }
    clearTimeout(timer)
  }
  process.exit(0)
}

exports.until = async (what, condition) => {
  for (let n = 0; n < 3000; n++) {
    if (await condition()) return
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  throw new Error(`in vain: ${what}`)
}

// The promise must be rejected with this SQLSTATE.
exports.rejects = async (promise, code) => {
  try {
    await promise
  } catch (error) {
    assert.strictEqual(error.code, code, error.message)
    return error
  }
  throw new Error(`no error ${code}`)
}
