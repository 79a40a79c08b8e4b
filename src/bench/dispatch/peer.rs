//! The process that `moemesh bench dispatch` talks to: stub nodes and a raw echo.
//! It lives until its standard input closes.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use expert_node::stub;
use mesh::lifecycle::Shutdown;
use mesh::transport::Endpoint;
use model::Checkpoint;
use proto::frame::Shape;
use serde::{Deserialize, Serialize};

use crate::up::runtime_dir::RuntimeDir;

/// What the measuring process wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ask {
    pub tcp: bool,
    pub nodes: usize,
    pub model: Model,
}

/// Whose experts the nodes have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Model {
    /// Of a model that is nothing else.
    Layer(Layer),
    /// Of all layers of the checkpoint there.
    Checkpoint(PathBuf),
}

/// One layer's sizes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Layer {
    pub hidden: usize,
    pub experts: u32,
    pub top_k: usize,
}

impl Model {
    fn open(&self) -> anyhow::Result<stub::Model> {
        Ok(match self {
            &Self::Layer(Layer { hidden, experts, top_k }) => {
                let (hidden, top_k) = (hidden as u32, top_k as u32);
                stub::Model::of_one_layer(Shape { hidden, experts, top_k })
            }
            Self::Checkpoint(dir) => stub::Model::of(Checkpoint::open(dir)?.as_ref()),
        })
    }
}

/// Where it is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Offer {
    pub nodes: Vec<String>,
    pub echo: String,
}

/// Serves what is asked for and prints the [`Offer`] on one line.
pub async fn serve(ask: Ask) -> anyhow::Result<()> {
    let dir = RuntimeDir::create().context("cannot make a directory for sockets")?;
    let shutdown = Shutdown::new();
    let model = Arc::new(ask.model.open()?);
    let mut nodes = Vec::new();
    for node in 0..ask.nodes {
        let endpoint: Endpoint = match ask.tcp {
            // Free a moment ago; nobody else is likely to take it.
            true => TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string().parse()?,
            false => Endpoint::Unix(dir.path().join(format!("node-{node}.sock"))),
        };
        nodes.push(endpoint.to_string());
        let experts = model.experts();
        let owner = |expert: u32| expert as usize * ask.nodes / experts as usize;
        let owned: Vec<u32> = (0..experts).filter(|&expert| owner(expert) == node).collect();
        let (model, stop) = (model.clone(), shutdown.clone());
        tokio::spawn(async move {
            if let Err(error) = stub::serve(&endpoint, &model, &owned, stop).await {
                eprintln!("stub node {endpoint}: {error}");
            }
        });
    }
    let echo = match ask.tcp {
        true => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let address = listener.local_addr()?.to_string();
            let sockets = move || listener.incoming().flatten().for_each(serve_echo);
            std::thread::spawn(sockets);
            address
        }
        false => {
            let path = dir.path().join("echo.sock");
            let listener = UnixListener::bind(&path)?;
            let sockets = move || listener.incoming().flatten().for_each(serve_echo);
            std::thread::spawn(sockets);
            Endpoint::Unix(path).to_string()
        }
    };
    println!("{}", serde_json::to_string(&Offer { nodes, echo })?);
    tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink())).await??;
    Ok(())
}

trait Socket: Read + Write + Send {
    /// Calls that would block return at once.
    fn stay_awake(&self) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn stay_awake(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Socket for UnixStream {
    fn stay_awake(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

/// On a thread of its own, until the client is gone.
fn serve_echo(socket: impl Read + Write + Send + 'static) {
    std::thread::spawn(move || answer(socket));
}

/// Sends back blocks of the length that the client says first.
fn answer(mut socket: impl Read + Write) -> io::Result<()> {
    let mut length = [0; 8];
    socket.read_exact(&mut length)?;
    let mut block = vec![0; u64::from_le_bytes(length) as usize];
    loop {
        socket.read_exact(&mut block)?;
        socket.write_all(&block)?;
    }
}

/// How the client of an echo waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// In a call that blocks.
    Asleep,
    /// Asking again and again.
    Awake,
}

/// The client of the raw echo: reads and writes, nothing else.
pub struct Echo {
    socket: Box<dyn Socket>,
    block: Vec<u8>,
}

impl Echo {
    pub fn connect(address: &str, length: usize, waiting: Waiting) -> anyhow::Result<Self> {
        let mut socket: Box<dyn Socket> = match address.parse()? {
            Endpoint::Tcp(address) => {
                let socket = TcpStream::connect(address)?;
                socket.set_nodelay(true)?;
                Box::new(socket)
            }
            Endpoint::Unix(path) => Box::new(UnixStream::connect(path)?),
        };
        socket.write_all(&(length as u64).to_le_bytes())?;
        if waiting == Waiting::Awake {
            socket.stay_awake()?;
        }
        Ok(Self { socket, block: vec![0; length] })
    }

    pub fn round_trip(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut written = 0;
        while written < bytes.len() {
            written += ready(|| self.socket.write(&bytes[written..]))?;
        }
        let mut read = 0;
        while read < bytes.len() {
            read += ready(|| self.socket.read(&mut self.block[read..]))?;
        }
        Ok(())
    }
}

/// What `call` gives once it has something to give. A blocking socket waits in it.
fn ready(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            other => return other,
        }
    }
}
