//! The witness over loopback: the same suite against BIND 9, Knot and the embedded server, and what only the embedded
//! one promises (its store, its narrow zone). Real sockets, real signatures, real processes.

#[path = "witness/embedded.rs"]
mod embedded;
#[path = "witness/relay.rs"]
mod relay;
#[path = "witness/servers.rs"]
mod servers;
#[path = "witness/suite.rs"]
mod suite;

/// Runs every case of the suite against one kind of server.
macro_rules! suite_against {
    ($module:ident, $kind:expr; $($case:ident)*) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    crate::suite::$case($kind).await;
                }
            )*
        }
    };
}

macro_rules! suites {
    ($($module:ident $kind:expr),*; $cases:tt) => { $( suites!(@one $module $kind; $cases); )* };
    (@one $module:ident $kind:expr; { $($case:ident)* }) => { suite_against!($module, $kind; $($case)*); };
}

suites! {
    against_bind crate::servers::Kind::Bind, against_knot crate::servers::Kind::Knot,
    against_the_embedded_witness crate::servers::Kind::Embedded;
    {
        swap_done_then_stale_then_back
        a_part_of_a_set_is_no_prerequisite
        the_first_marker_is_written_once
        an_unsigned_update_is_refused
        an_unknown_key_and_a_wrong_secret_are_refused
        a_clock_an_hour_off_is_refused
        a_zone_not_served_is_refused
        of_eight_racing_clients_exactly_one_wins
        signed_questions_get_signed_answers
        an_unsigned_answer_to_a_signed_question_is_silence
        a_forged_answer_before_the_real_one_is_passed_over
        an_update_without_answer_is_settled_by_the_next
        an_update_that_never_arrived_cannot_land_later
        a_long_answer_comes_by_tcp
        the_apex_survives_its_wipe
        dig_and_nsupdate_work
    }
}
