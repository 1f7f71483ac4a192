//! The VIPs' links as events of the turn. It decides nothing.

use crate::app::hands::mac_text;
use crate::engine::turn::Event;
use crate::io::links::{LinkEvent, LinkWatch};
use crate::io::vip::VipHand;
use std::time::Duration;
use tokio::sync::mpsc;

/// Finds the VIPs' interfaces (again and again until they are there) and translates what happens to them.
pub(super) async fn watch_links(nets: Vec<ipnet::IpNet>, interface: Option<String>, events: mpsc::Sender<Event>) {
    let mut vips = Vec::new();
    for net in &nets {
        loop {
            match VipHand::new(net, interface.as_deref()).await {
                Ok(hand) => {
                    let found = hand.vip().clone();
                    let event = Event::VipFound { address: found.address, mac: mac_text(found.mac) };
                    if events.send(event).await.is_err() {
                        return;
                    }
                    vips.push(found);
                    break;
                }
                Err(why) => {
                    let _gone = events.send(Event::VipBindFailed { address: net.addr(), why }).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
    // A watch for each interface: one link that is up says nothing about another that is down.
    let mut interfaces: Vec<String> = vips.iter().map(|vip| vip.interface.clone()).collect();
    interfaces.sort_unstable();
    interfaces.dedup();
    let (merged, mut heard) = mpsc::channel(crate::io::links::EVENTS_WAITING);
    for (n, interface) in interfaces.iter().enumerate() {
        let own: Vec<_> = vips.iter().filter(|vip| vip.interface == *interface).cloned().collect();
        let (sender, mut receiver) = mpsc::channel(crate::io::links::EVENTS_WAITING);
        let merged = merged.clone();
        tokio::spawn(async move {
            let _watch = LinkWatch::start(&own, sender);
            while let Some(event) = receiver.recv().await {
                if merged.send((n, event)).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(merged);
    let mut down = vec![false; interfaces.len()];
    while let Some((n, event)) = heard.recv().await {
        let event = match event {
            LinkEvent::AddressRemoved { address } => Event::VipRemoved { address },
            LinkEvent::AddressAdded { address, .. } => Event::VipIs { address, bound: true },
            LinkEvent::LinkUp { .. } | LinkEvent::LinkDown { .. } => {
                down[n] = matches!(event, LinkEvent::LinkDown { .. });
                if down.contains(&true) { Event::LinkDown } else { Event::LinkUp }
            }
            LinkEvent::ForeignClaim { address, mac } => Event::ForeignClaim { address, mac: mac_text(mac) },
            // Every fact follows anew.
            LinkEvent::Overrun => continue,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}
