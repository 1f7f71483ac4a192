//! What stands between client and server when things go wrong: relays that lose an answer, hold a request back, or
//! strip a signature. Each lives in the test's runtime and ends with it.

use super::servers::free_address;
use hickory_proto::op::Message;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;

/// One DNS message over TCP, there and back.
pub async fn exchange(server: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(message.len()).expect("short");
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await?;
    read_message(&mut stream).await
}

async fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Forwards one request over TCP, waits for the server's answer, and loses it: the client waits in vain.
pub async fn loses_the_answer(server: SocketAddr) -> SocketAddr {
    let (address, listener) = listen().await;
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.expect("a client");
        let request = read_message(&mut client).await.expect("a request");
        exchange(server, &request).await.expect("an answer");
        // Open until the client gives up.
        let _ = client.read_u8().await;
    });
    address
}

/// Takes one request over TCP and keeps it. When `release` is told to, the request goes to the server after all, and
/// the server's answer comes out of the second channel.
pub async fn holds_the_request(server: SocketAddr) -> (SocketAddr, oneshot::Sender<()>, oneshot::Receiver<Vec<u8>>) {
    let (address, listener) = listen().await;
    let (release, released) = oneshot::channel();
    let (answered, answer) = oneshot::channel();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.expect("a client");
        let request = read_message(&mut client).await.expect("a request");
        released.await.expect("to be released");
        let _ = answered.send(exchange(server, &request).await.expect("an answer"));
    });
    (address, release, answer)
}

/// Forwards questions over UDP and takes the signature off the answers; with `then_genuine`, the server's own follows.
pub async fn strips_the_signature(server: SocketAddr, then_genuine: bool) -> SocketAddr {
    let address = free_address();
    let front = UdpSocket::bind(address).await.expect("a free port");
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, client) = front.recv_from(&mut buffer).await.expect("a question");
            let back = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
            back.send_to(&buffer[..length], server).await.expect("sent");
            let length = back.recv(&mut buffer).await.expect("an answer");
            let genuine = &buffer[..length];
            let mut answer = Message::from_vec(genuine).expect("a DNS message");
            assert!(answer.take_signature().is_some(), "the server signs its answer");
            front.send_to(&answer.to_vec().expect("encodes"), client).await.expect("sent");
            if then_genuine {
                front.send_to(genuine, client).await.expect("sent");
            }
        }
    });
    address
}

/// Takes connections and datagrams and never says anything.
pub async fn says_nothing() -> SocketAddr {
    let (address, listener) = listen().await;
    let datagrams = UdpSocket::bind(address).await.expect("a free port");
    tokio::spawn(async move {
        let mut clients = Vec::new();
        loop {
            clients.push(listener.accept().await.expect("a client"));
        }
    });
    tokio::spawn(async move {
        loop {
            datagrams.recv(&mut [0; 512]).await.expect("a datagram");
        }
    });
    address
}

async fn listen() -> (SocketAddr, TcpListener) {
    let address = free_address();
    (address, TcpListener::bind(address).await.expect("a free port"))
}
