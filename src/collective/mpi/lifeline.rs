//! A connection from every rank to rank 0 over which nothing is ever said. The system closes it when a process ends, however it
//! ends: so a death is noticed at once, whatever the launcher does about it, and without waiting for a timeout.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// How long a rank tries one address of rank 0. Where no address works (a firewall), a death is found by the launcher or by
/// the timeout.
const TRY: Duration = Duration::from_secs(1);

/// What rank 0 offers, and the others need to find it.
pub(super) struct Offer {
    listener: TcpListener,
    secret: [u8; 16],
}

/// This rank's lines: to all others on rank 0, to rank 0 on the others.
#[derive(Default)]
pub(super) struct Lifelines(Vec<(usize, TcpStream)>);

impl Offer {
    /// Listens on all addresses of this machine; `None` where the system does not let it.
    pub fn new() -> Option<Self> {
        let listener = TcpListener::bind("0.0.0.0:0").ok()?;
        let mut secret = [0; 16];
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut secret)).ok()?;
        Some(Self { listener, secret })
    }

    /// The offer in bytes: port, secret, and this machine's addresses as text.
    pub fn to_bytes(&self) -> Vec<u8> {
        let port = self.listener.local_addr().map_or(0, |address| address.port());
        let addresses: Vec<String> = addresses().iter().map(IpAddr::to_string).collect();
        [&port.to_le_bytes(), &self.secret[..], addresses.join(" ").as_bytes()].concat()
    }

    /// Takes the lines of the other ranks, in the background, until `done` says that all have tried.
    pub fn accept(self, world_size: usize, done: impl FnOnce() -> bool) -> Lifelines {
        let Self { listener, secret } = self;
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let lines = thread::spawn(move || {
            let mut lines = Vec::new();
            _ = listener.set_nonblocking(true);
            while lines.len() + 1 < world_size {
                match listener.accept() {
                    Ok((stream, _)) => lines.extend(welcome(stream, &secret).ok()),
                    Err(_) if stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
            lines
        });
        let all_tried = done();
        drop(stop);
        let lines = lines.join().unwrap_or_default();
        if all_tried { Lifelines(lines) } else { Lifelines::default() }
    }
}

impl Lifelines {
    /// The line of rank `rank` to rank 0, by the offer of that; none where no address of it answers.
    pub fn take(offer: &[u8], rank: usize) -> Self {
        let line = || {
            let (port, rest) = offer.split_at_checked(2)?;
            let (secret, addresses) = rest.split_at_checked(16)?;
            let port = u16::from_le_bytes(port.try_into().ok()?);
            let addresses = str::from_utf8(addresses).ok()?.split(' ').filter_map(|text| text.parse::<IpAddr>().ok());
            addresses.into_iter().find_map(|ip| greet(SocketAddr::new(ip, port), secret, rank).ok())
        };
        Self(line().map(|stream| (0, stream)).into_iter().collect())
    }

    /// One of these ranks that has ended.
    pub fn ended(&self, among: &[usize]) -> Option<usize> {
        let closed = |stream: &TcpStream| match stream.peek(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        self.0.iter().find(|(rank, stream)| among.contains(rank) && closed(stream)).map(|(rank, _)| *rank)
    }
}

/// Asks a listener whether it is rank 0.
fn greet(address: SocketAddr, secret: &[u8], rank: usize) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, TRY)?;
    stream.set_read_timeout(Some(TRY))?;
    stream.write_all(&[secret, &(rank as u64).to_le_bytes()].concat())?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    stream.set_nonblocking(true)?;
    if answer == secret { Ok(stream) } else { Err(ErrorKind::InvalidData.into()) }
}

/// Answers whoever knows the secret; its rank.
fn welcome(mut stream: TcpStream, secret: &[u8; 16]) -> io::Result<(usize, TcpStream)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TRY))?;
    let mut greeting = [0; 24];
    stream.read_exact(&mut greeting)?;
    let (theirs, rank) = greeting.split_at(16);
    if theirs != secret {
        return Err(ErrorKind::InvalidData.into());
    }
    stream.write_all(secret)?;
    stream.set_nonblocking(true)?;
    Ok((u64::from_le_bytes(rank.try_into().expect("eight bytes")) as usize, stream))
}

/// The IPv4 addresses of this machine, those that others can reach first.
fn addresses() -> Vec<IpAddr> {
    let mut found = Vec::new();
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs gives a list that lives until freeifaddrs; of an address only what its family says is read.
    unsafe {
        if libc::getifaddrs(&mut first) != 0 {
            return found;
        }
        let mut entry = first;
        while let Some(interface) = entry.as_ref() {
            if let Some(address) = interface.ifa_addr.as_ref().filter(|a| i32::from(a.sa_family) == libc::AF_INET) {
                let address = (&raw const *address).cast::<libc::sockaddr_in>().read_unaligned();
                found.push(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()));
            }
            entry = interface.ifa_next;
        }
        libc::freeifaddrs(first);
    }
    found.sort_by_key(IpAddr::is_loopback);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_noticed_and_only_that() {
        let offer = Offer::new().unwrap();
        let bytes = offer.to_bytes();
        let port = offer.listener.local_addr().unwrap().port();
        let others = thread::spawn(move || {
            // Somebody who knows nothing does not count.
            let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stranger.write_all(&[7; 24]).unwrap();
            [1, 2].map(|rank| Lifelines::take(&bytes, rank))
        });
        let mut lines = Vec::new();
        let zero = offer.accept(3, || {
            lines.extend(others.join().unwrap());
            true
        });
        assert_eq!(lines.iter().map(|l| l.0.len()).sum::<usize>(), 2);
        assert_eq!((zero.ended(&[1, 2]), lines[1].ended(&[0])), (None, None));
        lines.pop();
        thread::sleep(Duration::from_millis(50));
        assert_eq!((zero.ended(&[1]), zero.ended(&[1, 2])), (None, Some(2)));
        drop(zero);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(lines[0].ended(&[0]), Some(0));
    }
}
