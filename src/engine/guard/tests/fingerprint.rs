//! When two guards are one state to the model: all that decides, and nothing that people only read.
//!
//! **Invariant:** a new field of the guard does not compile here until somebody has said which of the two it is; a
//! field that decides and is left out would merge states that differ, and the model would look away.

use super::super::{GateMemory, Guard};
use super::world::{Node, World};
use std::hash::{Hash, Hasher};

impl Hash for GateMemory {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Texts and the number of sessions are only shown.
        let GateMemory { open, until, paused, held, suspended, state: gate, reason: _, sessions: _ } = self;
        (open, until, paused, held, suspended, gate).hash(state);
    }
}

impl Hash for Guard {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Guard {
            // Of the setup only what names this life differs from state to state.
            setup,
            durable,
            next_seq,
            next_id,
            writing,
            fence_now,
            fence_retry,
            started,
            at,
            poll_at,
            renew_at,
            witness,
            proofs,
            proofs_from,
            peer,
            pg,
            pg_present,
            vips,
            link_up,
            gate,
            job,
            durability,
            takeover,
            handover,
            hold_over,
            rejoin,
            watching,
            followers,
            neighbours,
            units,
            last_ended,
            shutting_down,
            forwards,
            events: _,
            counters: _,
        } = self;
        (setup.start, &setup.boot).hash(state);
        (durable, next_seq, next_id, writing, fence_now, fence_retry, started).hash(state);
        (at, poll_at, renew_at, witness, proofs, peer, pg, pg_present, vips, link_up, gate).hash(state);
        (job, durability, takeover, handover, hold_over, rejoin).hash(state);
        (watching, followers, neighbours, units, last_ended, shutting_down, proofs_from, forwards).hash(state);
    }
}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Node {
            guard,
            clock,
            boots,
            life,
            // The shadow is its replay.
            disk: _,
            shadow,
            journal_broken,
            frozen_until,
            superseded,
            gate_until,
            pg,
            promotions,
            vip_until,
            off,
            fell,
            ends: _,
            asked,
            said: _,
        } = self;
        (guard, clock, boots, life, shadow, journal_broken, frozen_until).hash(state);
        (superseded, gate_until, pg, promotions, vip_until, off, fell, asked).hash(state);
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let World {
            now,
            nodes,
            record,
            // The same in all histories of one scenario, which is told apart by its nodes' setup.
            timing: _,
            poll: _,
            look_every: _,
            client_every: _,
            fence_postgres: _,
            first_silent: _,
            stonith: _,
            shot: _,
            asynchronous: _,
            block: _,
            fuse: _,
            mode: _,
            dns_up,
            dns_cut,
            rng,
            acked,
            acks: _,
            openings: _,
            turns: _,
            loss_accepted,
            check_acked: _,
            wire_up,
            streams_up,
            mute,
            second,
            deaf,
            gateway,
            lan_up,
            lose_update_answers,
            hold_updates,
            held,
            queue,
            // Only the sequence counts, not the numbers that keep it.
            order: _,
            ticket,
            owners,
            strict: _,
            broken,
            read: _,
            lean: _,
            log: _,
            // None in the model.
            meddler: _,
        } = self;
        (now, nodes, record, dns_up, dns_cut, rng, acked, loss_accepted).hash(state);
        (wire_up, mute, second, deaf, lose_update_answers, hold_updates, held, ticket, owners).hash(state);
        (gateway, lan_up, streams_up).hash(state);
        broken.as_ref().map(|(law, _)| law).hash(state);
        for ((at, _), delivery) in queue {
            (at, delivery).hash(state);
        }
    }
}
