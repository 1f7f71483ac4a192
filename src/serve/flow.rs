//! One direction's buffer, taken from its thread's free list only while bytes are in it.
//!
//! What it is NOT: it knows no message; the pump says what may pass.
//!
//! **Invariant:** never shows bytes of another session: only what was read into it lies before `end`.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes of one direction's buffer; the other side's socket is not read while it is full.
pub(crate) const BUFFER: usize = 16 * 1024;
/// Free buffers a thread keeps; more are given back to the allocator.
const FREE_BUFFERS: usize = 256;

thread_local!(static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) });

/// `start..parsed` may pass, `parsed..end` was not yet looked at or is held.
#[derive(Default)]
pub(crate) struct Flow {
    buffer: Option<Box<[u8]>>,
    pub(crate) start: usize,
    pub(crate) parsed: usize,
    pub(crate) end: usize,
}

impl Flow {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[..self.end])
    }

    pub(crate) fn passing(&self) -> &[u8] {
        &self.bytes()[self.start..self.parsed]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Moves what is left to the front. Returns by how much.
    pub(crate) fn compact(&mut self) -> usize {
        let shift = self.start;
        if shift > 0 {
            if let Some(buffer) = &mut self.buffer {
                buffer.copy_within(shift..self.end, 0);
            }
            (self.start, self.parsed, self.end) = (0, self.parsed - shift, self.end - shift);
        }
        shift
    }

    /// Takes `from..to` out; what lies behind moves up. The caller sees to it that `start <= from` and `to <= end`.
    pub(crate) fn cut(&mut self, from: usize, to: usize) {
        if let Some(buffer) = &mut self.buffer {
            buffer.copy_within(to..self.end, from);
        }
        self.end -= to - from;
    }

    /// Everything up to `to` is done with.
    pub(crate) fn skip_to(&mut self, to: usize) {
        (self.start, self.parsed) = (to, to);
        if self.is_empty() {
            self.release();
        }
    }

    /// Reads once behind `end`. `Ready(Ok(0))`: end of file (the buffer is never full here).
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        from: Pin<&mut impl AsyncRead>,
    ) -> Poll<io::Result<usize>> {
        let buffer = self.buffer.get_or_insert_with(|| {
            FREE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
        });
        let mut into = ReadBuf::new(&mut buffer[self.end..]);
        let read = from.poll_read(cx, &mut into).map_ok(|()| into.filled().len());
        if let Poll::Ready(Ok(n)) = read {
            self.end += n;
        }
        if self.is_empty() {
            self.release();
        }
        read
    }

    pub(crate) fn release_if_empty(&mut self) {
        if self.is_empty() {
            self.release();
        }
    }

    pub(crate) fn release(&mut self) {
        (self.start, self.parsed, self.end) = (0, 0, 0);
        if let Some(buffer) = self.buffer.take() {
            FREE.with_borrow_mut(|free| {
                if free.len() < FREE_BUFFERS {
                    free.push(buffer);
                }
            });
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.release();
    }
}
