//! The other nodes, asked over the peer channel as this node, with or without this node's daemon: what their own look
//! found, and what their clocks say.

use super::examine::{Answer, Examined, Question, Told, What};
use super::show::Progress;
use crate::base::config::{Config, Node};
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant};
use crate::io::{clock, files};
use crate::serve::peer::{PeerClient, PeerError, PeerIdentity};
use std::sync::Arc;

/// The whole look of another node: its own limit and the way.
const EXAMINE_LIMIT: Duration = Duration::from_millis(8500);
const CLOCK_LIMIT: Duration = Duration::from_millis(1500);
/// Between the first and the last questions for the time: what the rate is measured over.
const CLOCK_APART: Duration = Duration::from_millis(2000);
/// Questions at each end; the quickest answer is the truest.
const CLOCK_ASKED: usize = 3;

/// One answer to the question for the time.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub sent: Instant,
    pub got: Instant,
    /// This machine's wall clock when it was sent.
    pub wall_ms: i64,
    pub theirs_boot: Duration,
    pub theirs_wall_ms: i64,
}

impl Sample {
    pub fn round_trip(&self) -> Duration {
        self.got.since(self.sent)
    }

    /// The most likely moment of the answer.
    pub fn middle(&self) -> Instant {
        self.sent + self.round_trip() / 2
    }

    /// Seconds that the other wall clock is ahead, give or take half the round trip.
    pub fn offset(&self) -> f64 {
        let ours = Duration::from_millis(self.wall_ms.unsigned_abs()) + self.round_trip() / 2;
        Duration::from_millis(self.theirs_wall_ms.unsigned_abs()).as_secs_f64() - ours.as_secs_f64()
    }
}

/// One other node.
#[derive(Debug)]
pub struct Other {
    pub name: NodeName,
    pub examined: Result<Examined, String>,
    pub samples: Vec<Sample>,
}

/// Asks all other nodes at once; none, when told to `skip` them.
pub async fn ask(config: &Config, node: &Node, skip: bool, progress: &Progress) -> Vec<Other> {
    if skip {
        return Vec::new();
    }
    let others: Vec<&Node> = config.nodes.iter().filter(|other| other.name != node.name).collect();
    let identity = files::cluster_key(&config.cluster.key_file).and_then(|key| {
        let names: Vec<NodeName> = others.iter().map(|other| other.name.clone()).collect();
        PeerIdentity::new(&key, &node.name, &names).map(Arc::new)
    });
    let ask = async |other: &Node| -> Other {
        let name = other.name.clone();
        let identity = match &identity {
            Ok(identity) => Arc::clone(identity),
            Err(why) => return Other { name, examined: Err(why.clone()), samples: Vec::new() },
        };
        let client = PeerClient::new(identity, name.clone(), other.peer_listen);
        let (examined, samples) = tokio::join!(examine(&client), sample(&client));
        Other { name, examined, samples }
    };
    let all = others.iter().map(|other| progress.step(other.name.as_str(), ask(other)));
    futures_util::future::join_all(all).await
}

async fn examine(client: &PeerClient) -> Result<Examined, String> {
    let answer: Result<Answer, PeerError> = client.ask(&Question { doctor: What::Examine }, EXAMINE_LIMIT).await;
    match answer {
        Ok(Answer { doctor: Told::Examined(text) }) => serde_json::from_str(&text)
            .map_err(|error| format!("its answer is not understood ({error}); upgrade the older node")),
        Ok(Answer { doctor: Told::Failed(why) }) => Err(why),
        Ok(_) => Err("it answered another question".to_owned()),
        Err(PeerError::Refused(why)) if why.contains("not a message") => {
            Err("its daemon is older and does not know the question; upgrade it, or run doctor there".to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

async fn sample(client: &PeerClient) -> Vec<Sample> {
    let mut samples = Vec::new();
    for round in 0..2 * CLOCK_ASKED {
        if round == CLOCK_ASKED {
            tokio::time::sleep(CLOCK_APART).await;
        }
        let (sent, wall_ms) = (clock::now(), clock::wall().as_millisecond());
        let answer: Result<Answer, PeerError> = client.ask(&Question { doctor: What::Clock }, CLOCK_LIMIT).await;
        let Ok(Answer { doctor: Told::Clock { boot_ns, wall_ms: theirs_wall_ms } }) = answer else { break };
        let theirs_boot = Duration::from_nanos(boot_ns);
        samples.push(Sample { sent, got: clock::now(), wall_ms, theirs_boot, theirs_wall_ms });
    }
    samples
}
