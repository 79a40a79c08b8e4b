//! Authorities that issue what a test needs, good or bad, and a server that
//! shows what it saw.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proto::v1::expert_control_server::{ExpertControl, ExpertControlServer};
use proto::v1::{
    DescribeRequest, DrainReply, DrainRequest, DropReply, DropRequest, FetchPart, FetchRequest,
    LoadReply, LoadRequest, NodeDescription, NodeStatus, NodeStatusRequest, SetDrainedReply,
    SetDrainedRequest, WatchRequest,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    date_time_ymd,
};
use rustls::ClientConfig;
use rustls::crypto::ring;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use super::super::principal::authority_uri;
use super::super::verify::Servers;
use super::*;
use crate::lifecycle::Shutdown;
use crate::metrics::Metrics;

pub fn owner(role: Role, id: &str) -> Owner {
    Owner { role, id: Some(id.to_owned()) }
}

pub struct Authority {
    pub dir: PathBuf,
    mesh: String,
    params: CertificateParams,
    key: KeyPair,
}

impl Authority {
    pub fn new(mesh: &str) -> Self {
        Self::with(mesh, KeyPair::generate().unwrap())
    }

    /// One that signs for another mesh with the same key and name.
    pub fn sharing_key(mesh: &str, other: &Self) -> Self {
        Self::with(mesh, KeyPair::from_pem(&other.key.serialize_pem()).unwrap())
    }

    fn with(mesh: &str, key: KeyPair) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("tls-{}-{count}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.subject_alt_names = vec![SanType::URI(authority_uri(mesh).try_into().unwrap())];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let signed = params.self_signed(&key).unwrap();
        fs::write(dir.join("ca.pem"), signed.pem()).unwrap();
        Self { dir, mesh: mesh.to_owned(), params, key }
    }

    pub fn files(&self, role: Role, id: &str) -> Files {
        Files {
            certificate: self.dir.join(format!("{role}-{id}.pem")),
            key: self.dir.join(format!("{role}-{id}.key")),
            authorities: self.dir.join("ca.pem"),
        }
    }

    /// Valid for two days.
    pub fn issue(&self, role: Role, id: &str) -> Files {
        let now = super::super::now();
        let mut after = date_time_ymd(1970, 1, 3);
        after += std::time::Duration::from_secs(now as u64);
        self.sign(role, id, after, id)
    }

    /// Certificate files that have expired, and good ones with the same key.
    pub fn issue_expired(&self, role: Role, id: &str) -> (Files, Files) {
        let good = self.issue(role, id);
        let past = self.sign(role, id, date_time_ymd(2020, 1, 1), &format!("{id}-past"));
        (past, good)
    }

    fn sign(&self, role: Role, id: &str, after: time::OffsetDateTime, name: &str) -> Files {
        let mut params = CertificateParams::default();
        let uri = format!("spiffe://{}/{role}/{id}", self.mesh);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = after;
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let files = self.files(role, name);
        fs::write(&files.certificate, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }

    pub fn load(&self, role: Role, id: &str) -> Tls {
        Tls::load(&self.issue(role, id), owner(role, id)).unwrap()
    }

    /// Somebody of this authority who trusts another one.
    pub fn trusting(&self, role: Role, id: &str, other: &Self) -> Tls {
        let own = self.issue(role, id);
        let trusts = Files { authorities: other.dir.join("ca.pem"), ..own.clone() };
        Tls::pretend(&own, &trusts, owner(role, id))
    }

    /// Somebody whose certificate has expired since it was loaded.
    pub fn expired(&self, role: Role, id: &str) -> Tls {
        let (past, good) = self.issue_expired(role, id);
        Tls::pretend(&good, &past, owner(role, id))
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Tls {
    /// One whose files were good when they were checked, and are now these.
    fn pretend(good: &Files, now: &Files, owner: Owner) -> Self {
        let tls = Self::load(good, owner.clone()).unwrap();
        let mut material = Material::unchecked(now, &owner).unwrap().0;
        // Whoever cheats does not mind to whom he talks.
        if let Ok(mesh) = mesh_of_authority(&certificates(&now.authorities).unwrap()[0]) {
            material.principal.mesh = mesh;
        }
        tls.0.current.store(Arc::new(material));
        tls
    }
}

/// Shakes hands without a certificate.
pub async fn anonymous(
    authority: &Authority,
    socket: TcpStream,
) -> io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(ring::default_provider());
    let material = authority.load(Role::Router, "r0");
    let servers = Servers {
        roots: material.material().roots.clone(),
        algorithms: provider.signature_verification_algorithms,
        mesh: "m".to_owned(),
        expected: Expected::any(Role::ExpertNode),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(servers))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("mesh").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, socket).await
}

/// A server with a node's control service, which answers with its own id.
pub struct Served {
    pub endpoint: Endpoint,
    pub metrics: Metrics,
    shutdown: Shutdown,
    task: JoinHandle<()>,
    connections: Arc<AtomicUsize>,
}

impl Served {
    pub async fn start(endpoint: &str, tls: Option<Tls>) -> Self {
        let listener = transport::bind(&endpoint.parse().unwrap()).await.unwrap();
        let endpoint = listener.local();
        let (metrics, shutdown) = (Metrics::default(), Shutdown::new());
        if let Some(tls) = &tls {
            metrics.register(|registry| tls.0.metrics.register(registry, tls.clone()));
        }
        let connections = Arc::new(AtomicUsize::new(0));
        let id = tls.as_ref().map_or_else(String::new, |tls| tls.principal().id);
        let service = Fake { id, seen: Arc::default(), connections: connections.clone() };
        let routes = Routes::new(ExpertControlServer::new(service));
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            let stopped = async move { stop.wait().await };
            transport::serve_grpc(listener, routes, tls.as_ref(), stopped).await.unwrap();
        });
        Self { endpoint, metrics, shutdown, task, connections }
    }

    /// How many different connections calls have come on.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub async fn stop(self) {
        self.shutdown.trigger();
        self.task.await.unwrap();
    }
}

struct Fake {
    id: String,
    seen: Arc<parking_lot::Mutex<Vec<usize>>>,
    connections: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl ExpertControl for Fake {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<NodeDescription>, Status> {
        if let Some(Caller(principal)) = request.extensions().get() {
            let one = Arc::as_ptr(principal) as usize;
            let mut seen = self.seen.lock();
            if !seen.contains(&one) {
                seen.push(one);
                self.connections.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(Response::new(NodeDescription { node_id: self.id.clone(), ..Default::default() }))
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Ok(Response::new(NodeStatus::default()))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Ok(Response::new(DrainReply::default()))
    }

    type WatchStream = tokio_stream::Empty<Result<NodeDescription, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        Ok(Response::new(LoadReply::default()))
    }

    async fn drop(&self, _: Request<DropRequest>) -> Result<Response<DropReply>, Status> {
        Ok(Response::new(DropReply::default()))
    }

    async fn set_drained(
        &self,
        _: Request<SetDrainedRequest>,
    ) -> Result<Response<SetDrainedReply>, Status> {
        Ok(Response::new(SetDrainedReply::default()))
    }

    type FetchStream = tokio_stream::Empty<Result<FetchPart, Status>>;

    async fn fetch(&self, _: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        Err(Status::unimplemented(""))
    }
}
