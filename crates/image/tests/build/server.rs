//! A small file server that knows ranges, tells what it was asked, and breaks off when it is told to.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// What is served, and what was asked for.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// Path → file.
    pub(crate) files: BTreeMap<String, PathBuf>,
    /// Path → bytes after which the connection is closed, one number a request; none left: whole.
    pub(crate) breaks: BTreeMap<String, VecDeque<u64>>,
    /// The server is gone after its first break.
    pub(crate) dies: bool,
    /// `path` or `path from-byte`, in order.
    pub(crate) asked: Vec<String>,
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) files: Arc<Mutex<Files>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(address: SocketAddr, files: Files) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let files = Arc::new(Mutex::new(files));
        let ending = Arc::new(AtomicBool::new(false));
        let (served, end) = (Arc::clone(&files), Arc::clone(&ending));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if end.load(Ordering::Acquire) {
                    return;
                }
                let served = Arc::clone(&served);
                // A client that goes away is what some stories are about.
                let end = Arc::clone(&end);
                thread::spawn(move || drop(serve(&stream.unwrap(), &served, &end)));
            }
        });
        Self { address, files, ending, thread: Some(thread) }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.files.lock().unwrap().asked.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        drop(TcpStream::connect(self.address));
        drop(self.thread.take().unwrap().join());
    }
}

fn serve(stream: &TcpStream, files: &Mutex<Files>, ending: &AtomicBool) -> io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap()?;
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let mut from = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = Some(range.trim_end_matches('-').parse::<u64>().unwrap());
        }
    }
    let (file, limit, dies) = {
        let mut files = files.lock().unwrap();
        files.asked.push(from.map_or_else(|| path.clone(), |from| format!("{path} {from}")));
        let limit = files.breaks.get_mut(&path).and_then(VecDeque::pop_front);
        (files.files.get(&path).cloned(), limit, limit.is_some() && files.dies)
    };
    let mut stream = stream;
    let Some(file) = file else {
        return stream.write_all(b"HTTP/1.1 404 .\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let mut file = File::open(file)?;
    let total = file.metadata()?.len();
    let start = from.unwrap_or(0);
    if start >= total && from.is_some() {
        let head = format!(
            "HTTP/1.1 416 .\r\nContent-Range: bytes */{total}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        return stream.write_all(head.as_bytes());
    }
    let length = total - start;
    let (status, range) = match from {
        None => ("200", String::new()),
        Some(from) => ("206", format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1)),
    };
    write!(stream, "HTTP/1.1 {status} .\r\n{range}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
    file.seek(SeekFrom::Start(start))?;
    io::copy(&mut file.take(limit.unwrap_or(length)), &mut stream)?;
    if dies {
        ending.store(true, Ordering::Release);
        let address = stream.local_addr()?;
        // Each of them wakes whoever accepts, until nobody does.
        while TcpStream::connect(address).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    }
    stream.flush()
}
