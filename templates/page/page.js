(function () {
"use strict";
// What came last, and when: ages and the lease go on from there, and silence is shown.
var came = Date.now(), heard = Date.now(), waiting = {}, source = null;
var gone = document.getElementById("gone");

function human(ms) {
  var s = Math.floor(ms / 1000);
  if (s < 10) { return s + "." + Math.floor(ms % 1000 / 100) + " s"; }
  if (s < 120) { return s + " s"; }
  if (s < 7200) { return Math.floor(s / 60) + " min"; }
  return s < 172800 ? Math.floor(s / 3600) + " h" : Math.floor(s / 86400) + " days";
}

// Who is marking a command to copy it is not disturbed.
function marked(element) {
  var chosen = document.getSelection();
  return chosen && !chosen.isCollapsed && element.contains(chosen.anchorNode);
}

function put() {
  Object.keys(waiting).forEach(function (id) {
    var element = document.getElementById(id);
    if (element && !marked(element)) {
      element.innerHTML = waiting[id];
      delete waiting[id];
    }
  });
}

function tick() {
  var now = Date.now(), silent = now - heard > 3500;
  document.querySelectorAll("[data-age]").forEach(function (e) {
    e.textContent = human(Number(e.dataset.age) + now - came) + " ago";
  });
  document.querySelectorAll("[data-left]").forEach(function (e) {
    var left = Math.max(0, Number(e.dataset.left) - (now - came)), bar = e.parentNode.querySelector("progress");
    e.textContent = left > 0 ? human(left) + " left" : "none";
    if (bar) { bar.value = left; }
  });
  gone.hidden = !silent;
  document.body.classList.toggle("stale", silent);
  if (silent) {
    gone.textContent = "Not live: nothing has come from this daemon for " + human(now - heard) +
      ". What stands here may not be true any more.";
  }
}

function listen() {
  if (source) { source.close(); }
  source = new EventSource("live");
  source.onmessage = function (message) {
    var news = JSON.parse(message.data);
    came = heard = Date.now();
    document.title = news.title;
    Object.assign(waiting, news.sections);
    put();
    tick();
  };
  // A browser that was refused (too many streams) does not try again by itself.
  source.onerror = function () {
    if (source.readyState === EventSource.CLOSED) { setTimeout(listen, 3000); }
  };
}

setInterval(tick, 250);
listen();
})();
