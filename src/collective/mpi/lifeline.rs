//! A TCP connection from every rank to rank 0, idle after its handshake. The operating system closes it when a process
//! ends, for whatever reason. So a death is noticed at once, without waiting for the timeout or for the launcher.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// How long a rank tries to connect to one address of rank 0. If no address works (a firewall), a death is only found
/// by the launcher or the timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Rank 0's listening socket, with a random secret by which it and the other ranks recognise each other.
pub(super) struct Listener {
    socket: TcpListener,
    secret: [u8; 16],
}

/// This rank's connections with the rank at the other end: on rank 0 to all others, on the others to rank 0.
#[derive(Default)]
pub(super) struct Lifelines(Vec<(usize, TcpStream)>);

impl Listener {
    /// Listens on all IPv4 addresses of this machine, on a free port; `None` if the system refuses.
    pub fn bind() -> Option<Self> {
        let socket = TcpListener::bind("0.0.0.0:0").ok()?;
        let mut secret = [0; 16];
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut secret)).ok()?;
        Some(Self { socket, secret })
    }

    /// What the other ranks need to connect, serialized: port, secret, and this machine's addresses as text.
    pub fn address(&self) -> Vec<u8> {
        let port = self.socket.local_addr().map_or(0, |address| address.port());
        let addresses: Vec<String> = addresses().iter().map(IpAddr::to_string).collect();
        [&port.to_le_bytes(), &self.secret[..], addresses.join(" ").as_bytes()].concat()
    }

    /// Accepts the connections of the other ranks on a background thread while `done` runs. `done` returns once all
    /// ranks have tried to connect; if it returns false, there are no connections.
    pub fn accept(self, world_size: usize, done: impl FnOnce() -> bool) -> Lifelines {
        let Self { socket, secret } = self;
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let acceptor = thread::spawn(move || {
            let mut connections = Vec::new();
            _ = socket.set_nonblocking(true);
            while connections.len() + 1 < world_size {
                match socket.accept() {
                    Ok((stream, _)) => connections.extend(server_handshake(stream, &secret).ok()),
                    Err(_) if stopped.try_recv() != Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
            connections
        });
        let all_tried = done();
        drop(stop);
        let connections = acceptor.join().unwrap_or_default();
        if all_tried { Lifelines(connections) } else { Lifelines::default() }
    }
}

impl Lifelines {
    /// Connects rank `rank` to rank 0, given [`Listener::address`]. Empty if no address of rank 0 answers.
    pub fn connect(address: &[u8], rank: usize) -> Self {
        let connection = || {
            let (port, rest) = address.split_at_checked(2)?;
            let (secret, addresses) = rest.split_at_checked(16)?;
            let port = u16::from_le_bytes(port.try_into().ok()?);
            let addresses = str::from_utf8(addresses).ok()?.split(' ').filter_map(|text| text.parse::<IpAddr>().ok());
            addresses.into_iter().find_map(|ip| client_handshake(SocketAddr::new(ip, port), secret, rank).ok())
        };
        Self(connection().map(|stream| (0, stream)).into_iter().collect())
    }

    /// A rank of `among` whose process has ended, if any.
    pub fn ended(&self, among: &[usize]) -> Option<usize> {
        let closed = |stream: &TcpStream| match stream.peek(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        self.0.iter().find(|(rank, stream)| among.contains(rank) && closed(stream)).map(|(rank, _)| *rank)
    }
}

/// Connects to a listener, sends secret and rank, and expects the secret back: otherwise it is not rank 0.
fn client_handshake(address: SocketAddr, secret: &[u8], rank: usize) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    stream.write_all(&[secret, &(rank as u64).to_le_bytes()].concat())?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    stream.set_nonblocking(true)?;
    if answer == secret { Ok(stream) } else { Err(ErrorKind::InvalidData.into()) }
}

/// Answers a client that knows the secret, and returns its rank with the connection.
fn server_handshake(mut stream: TcpStream, secret: &[u8; 16]) -> io::Result<(usize, TcpStream)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
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

/// The IPv4 addresses of this machine, loopback last.
fn addresses() -> Vec<IpAddr> {
    let mut found = Vec::new();
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs returns a list that is valid until freeifaddrs; an address is read as sockaddr_in only if its
    // family is AF_INET.
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
    fn a_closed_connection_names_the_dead_rank() {
        let listener = Listener::bind().unwrap();
        let address = listener.address();
        let port = listener.socket.local_addr().unwrap().port();
        let others = thread::spawn(move || {
            // A client without the secret is not a rank.
            let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stranger.write_all(&[7; 24]).unwrap();
            [1, 2].map(|rank| Lifelines::connect(&address, rank))
        });
        let mut lines = Vec::new();
        let zero = listener.accept(3, || {
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
