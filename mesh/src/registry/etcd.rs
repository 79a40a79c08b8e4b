//! Members' keys in etcd: each lives as long as its process renews the lease it
//! hangs on. While etcd is away everybody goes on with those they know; when it
//! is back, everybody registers again.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Event, EventType, GetOptions,
    Identity, KeyValue, PutOptions, TlsOptions, Txn, TxnOp, WatchOptions,
};
use serde_json::{Value, json};
use tokio::time::{error::Elapsed, interval, sleep, timeout};

use super::{Etcd, Member, Server};
use crate::lifecycle::Shutdown;
use crate::tls::Role;
use crate::transport::Endpoint;

/// How long a key outlives a process that has stopped renewing its lease.
const LEASE: Duration = Duration::from_secs(6);
pub(super) const RENEW: Duration = Duration::from_secs(2);
/// How long one answer is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
pub(super) const RETRY: Duration = Duration::from_millis(500);
/// How often known members are named again, so that nobody forgets them.
const REMIND: Duration = Duration::from_secs(5);

/// Why etcd was of no help.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Etcd(#[from] etcd_client::Error),
    #[error("no answer within {PATIENCE:?}")]
    Slow(#[from] Elapsed),
    #[error("cannot read {0}: {1}")]
    File(String, std::io::Error),
    #[error("the lease has expired")]
    Expired,
    #[error("the watch has ended")]
    Ended,
    #[error(
        "the name is taken by the process at {0}: every process of a role needs an `id` of its own"
    )]
    Taken(String),
}

/// The last trouble that was logged: an outage is told of once.
#[derive(Default)]
pub(super) struct Quiet(Option<String>);

impl Quiet {
    pub fn complain(&mut self, what: &str, trouble: &Trouble) {
        let trouble = trouble.to_string();
        if self.0.as_ref() != Some(&trouble) {
            tracing::warn!(trouble, "etcd: {what}");
            self.0 = Some(trouble);
        }
    }

    /// Etcd answers again.
    pub fn clear(&mut self) {
        if self.0.take().is_some() {
            tracing::info!("etcd is back");
        }
    }
}

/// A lease and the connection over which it is renewed.
pub(super) struct Lease {
    pub client: Client,
    pub id: i64,
    /// When it ends, by this process's clock: never later than by etcd's.
    pub until: Instant,
}

impl Lease {
    pub async fn grant(mut client: Client) -> Result<Self, Trouble> {
        let asked = Instant::now();
        let granted = client.lease_grant(LEASE.as_secs() as i64, None);
        let id = timeout(PATIENCE, granted).await??.id();
        Ok(Self { client, id, until: asked + LEASE })
    }

    /// Asks for the whole time anew.
    pub async fn renew(&mut self) -> Result<(), Trouble> {
        let asked = Instant::now();
        // It has read an answer by which the lease lives.
        let renewed = timeout(PATIENCE, self.client.lease_keep_alive(self.id)).await?;
        if let Err(etcd_client::Error::LeaseKeepAliveError(_)) = renewed {
            return Err(Trouble::Expired);
        }
        renewed?;
        self.until = asked + LEASE;
        Ok(())
    }

    /// Best effort: a lease that is not given up expires.
    pub async fn give_up(mut self) {
        let _ = timeout(PATIENCE, self.client.lease_revoke(self.id)).await;
    }
}

impl Etcd {
    /// A connection, made with the certificates that the files hold now.
    pub(super) async fn connect(&self) -> Result<Client, Trouble> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(PATIENCE)
            .with_keep_alive(RENEW, PATIENCE)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let secure = |server: &&Server| server.is_secure(self.tls.is_some());
        if self.servers.iter().any(|server| secure(&server))
            && let Some(files) = &self.tls
        {
            let identity = Identity::from_pem(read(&files.certificate)?, read(&files.key)?);
            let authorities = Certificate::from_pem(read(&files.authorities)?);
            options =
                options.with_tls(TlsOptions::new().identity(identity).ca_certificate(authorities));
        }
        let url = |server: &Server| {
            let scheme = if secure(&server) { "https" } else { "http" };
            format!("{scheme}://{}", server.address)
        };
        let servers: Vec<String> = self.servers.iter().map(url).collect();
        Ok(timeout(PATIENCE, Client::connect(&servers, Some(options))).await??)
    }

    pub(super) fn key(&self, rest: &str) -> String {
        format!("{}{rest}", self.prefix)
    }

    fn members(&self, role: Role) -> String {
        self.key(&format!("{role}/"))
    }

    /// Keeps `member` registered until `shutdown`.
    pub async fn register(self, member: Member, shutdown: Shutdown) {
        let mut held = None;
        let registering = async {
            let mut quiet = Quiet::default();
            loop {
                let Err(trouble) = self.keep(&member, &mut held, &mut quiet).await;
                quiet.complain(&format!("{} `{}`", member.role, member.id), &trouble);
                sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = registering => {}
            () = shutdown.wait() => {}
        }
        if let Some(lease) = held {
            lease.give_up().await;
        }
    }

    async fn keep(
        &self,
        member: &Member,
        held: &mut Option<Lease>,
        quiet: &mut Quiet,
    ) -> Result<Infallible, Trouble> {
        let mut client = self.connect().await?;
        let key = self.members(member.role) + &member.id;
        let lease = held.insert(Lease::grant(client.clone()).await?);
        let text = describe(member);
        let put =
            TxnOp::put(key.clone(), text.clone(), Some(PutOptions::new().with_lease(lease.id)));
        loop {
            // Whoever was here before under this name is this process, or has gone.
            let there = timeout(PATIENCE, client.get(key.clone(), None)).await??;
            let there = there.kvs().first();
            if let Some(other) = there.and_then(endpoint)
                && other != member.endpoint
            {
                quiet.complain("cannot be registered", &Trouble::Taken(other.to_string()));
                lease.renew().await?;
                sleep(RENEW).await;
                continue;
            }
            let unchanged = Compare::mod_revision(
                key.clone(),
                CompareOp::Equal,
                there.map_or(0, KeyValue::mod_revision),
            );
            let register = Txn::new().when([unchanged]).and_then([put.clone()]);
            if timeout(PATIENCE, client.txn(register)).await??.succeeded() {
                break;
            }
        }
        quiet.clear();
        tracing::info!(key, "registered in etcd");
        loop {
            sleep(RENEW).await;
            lease.renew().await?;
        }
    }

    /// Has `hear` told of every member of `role`, again and again for as long as it is
    /// known. One that is no longer registered is not named any more, that is all.
    pub async fn follow(self, role: Role, hear: impl Fn(&Endpoint) + Send) {
        let mut known = BTreeMap::new();
        let mut quiet = Quiet::default();
        loop {
            let Err(trouble) = self.watch(role, &mut known, &hear, &mut quiet).await;
            quiet.complain(&format!("{role}s are not followed"), &trouble);
            known.values().for_each(&hear);
            sleep(RETRY).await;
        }
    }

    async fn watch(
        &self,
        role: Role,
        known: &mut BTreeMap<Vec<u8>, Endpoint>,
        hear: &(impl Fn(&Endpoint) + Send),
        quiet: &mut Quiet,
    ) -> Result<Infallible, Trouble> {
        let mut client = self.connect().await?;
        let prefix = self.members(role);
        let all = Some(GetOptions::new().with_prefix());
        let listed = timeout(PATIENCE, client.get(prefix.clone(), all)).await??;
        let revision = listed.header().map_or(0, |header| header.revision());
        known.clear();
        known.extend(listed.kvs().iter().filter_map(member));
        quiet.clear();
        let after = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut changes = timeout(PATIENCE, client.watch(prefix, Some(after))).await??;
        let mut remind = interval(REMIND);
        loop {
            tokio::select! {
                change = changes.message() => {
                    let Some(change) = change? else { return Err(Trouble::Ended) };
                    if change.canceled() {
                        return Err(Trouble::Ended);
                    }
                    for event in change.events() {
                        take(event, known, hear);
                    }
                }
                _ = remind.tick() => known.values().for_each(hear),
            }
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Trouble> {
    std::fs::read(path).map_err(|error| Trouble::File(path.display().to_string(), error))
}

/// What a member's key holds, for programs and people.
fn describe(member: &Member) -> String {
    let model: String = member.model.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "endpoint": member.endpoint.to_string(), "model": model }).to_string()
}

fn endpoint(pair: &KeyValue) -> Option<Endpoint> {
    let value: Value = serde_json::from_slice(pair.value()).ok()?;
    value["endpoint"].as_str()?.parse().ok()
}

fn member(pair: &KeyValue) -> Option<(Vec<u8>, Endpoint)> {
    let found = endpoint(pair);
    if found.is_none() {
        let key = String::from_utf8_lossy(pair.key());
        tracing::warn!(%key, "etcd: a member without an endpoint is left out");
    }
    Some((pair.key().to_vec(), found?))
}

fn take(
    event: &Event,
    known: &mut BTreeMap<Vec<u8>, Endpoint>,
    hear: &(impl Fn(&Endpoint) + Send),
) {
    let Some(pair) = event.kv() else { return };
    match event.event_type() {
        EventType::Put => {
            if let Some((key, endpoint)) = member(pair) {
                hear(&endpoint);
                known.insert(key, endpoint);
            }
        }
        EventType::Delete => _ = known.remove(pair.key()),
    }
}
