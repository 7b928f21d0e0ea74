//! A server on this machine that speaks the hub's routes: the list of a revision's files, files with `Range`, and large files
//! behind a redirect.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The one model of the server.
pub const ID: &str = "org/tiny";

/// What the server holds, how it misbehaves, and what it was asked.
#[derive(Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    pub commit: String,
    /// Revision of [`Self::commit`].
    pub revision: String,
    /// Requests need this token.
    pub token: Option<String>,
    /// Answers of this status to requests whose path holds the text.
    pub refusals: HashMap<String, u16>,
    /// Files whose body ends after so many bytes, that often.
    pub cuts: HashMap<String, (usize, usize)>,
    /// Files that arrive with a flipped bit.
    pub damaged: Vec<String>,
    /// Sizes that the list of files claims.
    pub claims: HashMap<String, u64>,
    /// Answers to nothing.
    pub silent: bool,
    /// `METHOD PATH RANGE` of each request for bytes beyond the first.
    pub requests: Vec<String>,
}

impl State {
    fn is_large(name: &str) -> bool {
        name.ends_with(".safetensors") || name.ends_with(".bin")
    }

    fn hash(name: &str, bytes: &[u8]) -> String {
        let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect();
        match Self::is_large(name) {
            true => hex(&Sha256::digest(bytes)),
            false => hex(&Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize()),
        }
    }

    fn listing(&self) -> String {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let size = self.claims.get(name).copied().unwrap_or(bytes.len() as u64);
            let mut file =
                json!({"rfilename": name, "size": size, "blobId": "0123456789abcdef0123456789abcdef01234567"});
            match Self::is_large(name) {
                true => file["lfs"] = json!({"sha256": Self::hash(name, bytes), "size": size, "pointerSize": 134}),
                false => file["blobId"] = Self::hash(name, bytes).into(),
            }
            file
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        json!({"id": ID, "sha": self.commit, "siblings": siblings}).to_string()
    }
}

/// The running server; it ends with the process.
pub struct Hub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let commit = "c0ffee".repeat(7)[..40].to_owned();
        let state = State { files, commit, revision: "main".into(), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (shared, own) = (Arc::clone(&state), endpoint.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, own) = (Arc::clone(&shared), own.clone());
                // A client may close the connection at any time.
                thread::spawn(move || stream.and_then(|stream| answer(stream, &shared, &own)));
            }
        });
        Self { endpoint, state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state().requests)
    }
}

struct Asked {
    path: String,
    range: Option<(usize, Option<usize>)>,
    token: Option<String>,
}

fn read_request(stream: &TcpStream) -> std::io::Result<Asked> {
    let mut lines = BufReader::new(stream);
    let mut first = String::new();
    lines.read_line(&mut first)?;
    let mut asked = Asked { path: first.split(' ').nth(1).unwrap_or("/").into(), range: None, token: None };
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { return Ok(asked) };
        match &*name.to_lowercase() {
            "range" => {
                let (from, to) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                asked.range = Some((from.parse().unwrap(), to.parse().ok()));
            }
            "authorization" => asked.token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, endpoint: &str) -> std::io::Result<()> {
    let asked = read_request(&stream)?;
    let mut state = state.lock().unwrap();
    if state.silent {
        drop(state);
        return stream.read_to_end(&mut Vec::new()).map(drop); // until the client gives up
    }
    let probe = asked.range == Some((0, Some(0)));
    if !probe {
        let range = asked.range.map_or_else(String::new, |(from, _)| format!(" {from}"));
        state.requests.push(format!("{}{range}", asked.path));
    }
    let refused = state.refusals.iter().find(|(path, _)| asked.path.contains(&**path) && !probe).map(|(_, s)| *s);
    let allowed = state.token.is_none() || asked.path.starts_with("/cdn/") || asked.token == state.token;
    let status = |code: u16| format!("HTTP/1.1 {code} X\r\nConnection: close\r\n");
    let plain = |code, body: &str| format!("{}Content-Length: {}\r\n\r\n{body}", status(code), body.len());
    if let Some(code) = refused.or((!allowed).then_some(401)) {
        return stream.write_all(plain(code, "no").as_bytes());
    }
    if asked.path == format!("/api/models/{ID}/revision/{}?blobs=true", state.revision) {
        return stream.write_all(plain(200, &state.listing()).as_bytes());
    }
    let resolve = format!("/{ID}/resolve/{}/", state.commit);
    let (name, direct) = match (asked.path.strip_prefix(&resolve), asked.path.strip_prefix("/cdn/")) {
        (Some(name), _) => (name.to_owned(), false),
        (_, Some(name)) => (name.to_owned(), true),
        _ => return stream.write_all(plain(404, "no").as_bytes()),
    };
    let Some(mut body) = state.files.get(&name).cloned() else { return stream.write_all(plain(404, "no").as_bytes()) };
    let hash = State::hash(&name, &body);
    if State::is_large(&name) && !direct {
        let commit = &state.commit;
        let head = format!(
            "{}Content-Length: 0\r\nLocation: {endpoint}/cdn/{name}\r\nX-Linked-Etag: \"{hash}\"\r\nX-Repo-Commit: {commit}\r\n\r\n",
            status(302)
        );
        return stream.write_all(head.as_bytes());
    }
    if state.damaged.contains(&name) {
        *body.last_mut().unwrap() ^= 1;
    }
    let (from, to) = asked.range.unwrap_or((0, None));
    let to = to.map_or(body.len(), |to| to + 1).min(body.len());
    let head = format!(
        "{}Content-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nETag: \"{hash}\"\r\nX-Repo-Commit: {}\r\n\r\n",
        status(206),
        to - from,
        to - 1,
        body.len(),
        state.commit
    );
    stream.write_all(head.as_bytes())?;
    let cut = state.cuts.get_mut(&name).filter(|(left, _)| *left > 0 && !probe).map(|(left, bytes)| {
        *left -= 1;
        *bytes
    });
    stream.write_all(&body[from..cut.map_or(to, |cut| to.min(from + cut))])
}
