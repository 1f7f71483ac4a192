//! What arbitrary bytes are put through: the pure decoders of `wire::pg`. Shared by the suite `fuzz` and by the target
//! of cargo-fuzz (fuzz/). What it is NOT: it generates nothing.

use portcullis::wire::pg::{self, Exchange, Look, Opening};

/// Panics where a decoder panics, goes astray, or depends on how the bytes were cut.
pub fn exercise(data: &[u8]) {
    opening(data);
    let (client, backend) = data.split_at(data.len() / 2);
    let whole = exchange(client, backend, usize::MAX);
    for piece in [1, 7, 64] {
        assert_eq!(exchange(client, backend, piece), whole, "it matters where the bytes are cut");
    }
    bodies(data);
}

fn opening(data: &[u8]) {
    if let Some(word) = data.first_chunk::<4>()
        && let Ok(rest) = pg::opening_rest(*word)
    {
        assert!(rest <= pg::MAX_OPENING, "an opening packet without a limit");
    }
    if let Ok(Opening::Startup(startup)) = pg::opening(data) {
        let again = startup.encode();
        let Ok(Opening::Startup(back)) = pg::opening(&again[4..]) else { panic!("what was encoded is not decoded") };
        assert_eq!(
            (&back.user, &back.database, &back.parameters),
            (&startup.user, &startup.database, &startup.parameters)
        );
        assert!(back.options.is_empty() && startup.user.len() < 64 && startup.database.len() < 64);
        let _ = startup.wants_replication();
    }
}

fn bodies(data: &[u8]) {
    for code in *b"CMRSV" {
        let _ = pg::field(data, code);
    }
    assert!(pg::fields(data).count() <= data.len());
    let _ = pg::is_sync_wait_given_up(data);
    let _ = pg::own_query(data);
    let left = usize::from(data.first().copied().unwrap_or(0));
    let _ = pg::is_between_messages(data, 0, left, data.len());
    let _ = pg::is_between_messages(data, usize::MAX - 1, left, usize::MAX);
}

/// Runs both streams through an exchange in pieces; where it stands afterwards.
fn exchange(client: &[u8], backend: &[u8], piece: usize) -> Option<(u8, bool, bool, usize, usize)> {
    let mut exchange = Exchange::new(b'I');
    let up = walk(client, piece, |bytes, at| match exchange.look_client(bytes, at, true) {
        Ok(Look::Rest(header) | Look::Statement(header)) => {
            exchange.pass_client(header, at);
            Some(true)
        }
        Ok(_) => Some(false),
        Err(_) => None,
    });
    let down = walk(backend, piece, |bytes, at| match exchange.look_backend(bytes, at, true) {
        Ok(Look::Success(header) | Look::Notice(header) | Look::Reply(header)) => {
            exchange.pass_backend(header, bytes, at);
            Some(true)
        }
        Ok(_) => Some(false),
        Err(_) => None,
    });
    (up && down).then(|| {
        let at_rest = exchange.at_rest();
        assert!(!at_rest || exchange.is_quiet());
        (exchange.status(), at_rest, exchange.is_discarding(), exchange.client_left(), exchange.backend_left())
    })
}

/// Gives the bytes in pieces, as a socket would. Whether they were well-formed.
fn walk(data: &[u8], piece: usize, mut look: impl FnMut(&[u8], &mut usize) -> Option<bool>) -> bool {
    let (mut at, mut end) = (0, 0);
    loop {
        let before = at;
        let Some(more) = look(&data[..end], &mut at) else { return false };
        assert!(before <= at && at <= end, "it looks past what is there");
        if !more && at == before {
            if end == data.len() {
                return true;
            }
            end = end.saturating_add(piece).min(data.len());
        }
    }
}
