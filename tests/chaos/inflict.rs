//! Does a fault to a running mesh, sees that it happened while sequences ran,
//! heals it, and waits until the mesh is whole again.

use std::time::{Duration, Instant};

use super::load::Balancer;
use super::observe::{Counters, is_whole, metric, statuses, until};
use super::quota::Quota;
use super::scenario::{Fault, Role, Which};
use crate::support::Sandbox;
use crate::support::certs::issue;
use crate::support::dice::Dice;
use crate::support::faultproxy::{Faults, Way};
use crate::support::http::Address;
use crate::support::netns::Harm;
use crate::support::process::{Process, signal};

const PATIENCE: Duration = Duration::from_secs(60);
/// A client that is told of a gateway that goes has its last request under way by then.
const NOTICE: Duration = Duration::from_millis(150);

/// How long a mesh took that was not whole again in [`PATIENCE`] after the fault.
pub const NEVER: Duration = Duration::MAX;

/// A fault that was done.
pub struct Struck {
    pub what: String,
    /// Sequences that ran or waited just before.
    pub running: u64,
    /// Until the mesh was whole again, or [`NEVER`].
    pub whole: Duration,
}

pub struct Inflict<'a> {
    balancer: &'a Balancer,
    turns: [usize; 3],
    notes: Vec<String>,
}

impl<'a> Inflict<'a> {
    pub fn new(balancer: &'a Balancer) -> Self {
        Self { balancer, turns: [0; 3], notes: Vec::new() }
    }

    pub fn notes(self) -> Vec<String> {
        self.notes
    }

    pub async fn one(
        &mut self,
        fault: &Fault,
        mesh: &mut Sandbox,
        counters: &Counters,
        dice: &mut Dice,
    ) -> Struck {
        counters.look(mesh).await;
        let running = running(mesh).await;
        let begun = Instant::now();
        let what = self.strike(fault, mesh, dice).await;
        let healed = Instant::now();
        let mut whole = false;
        while !whole && healed.elapsed() < PATIENCE {
            whole = is_whole(mesh).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        counters.look(mesh).await;
        let whole = if whole { begun.elapsed() } else { NEVER };
        Struck { what, running, whole }
    }

    async fn strike(&mut self, fault: &Fault, mesh: &mut Sandbox, dice: &mut Dice) -> String {
        match *fault {
            Fault::Kill { role, which, down } => {
                let process = self.pick(role, which, mesh, dice).await;
                process.kill();
                tokio::time::sleep(down).await;
                process.restart();
                format!("kill {}", process.name)
            }
            Fault::Stop { role, which, hold } => {
                let process = self.pick(role, which, mesh, dice).await;
                let halted = Halted::stop(process.id());
                tokio::time::sleep(hold).await;
                drop(halted);
                format!("stop {}", process.name)
            }
            Fault::Restart { role, which } => {
                let at = self.choose(role, which, mesh, dice).await;
                if role == Role::Gateway {
                    self.balancer.set(at, false);
                    tokio::time::sleep(NOTICE).await;
                }
                let process = &mut of(role, mesh)[at];
                let pid = process.id();
                signal(pid, "TERM");
                let begun = Instant::now();
                let status = loop {
                    match process.ended() {
                        Some(status) => break status,
                        None if begun.elapsed() > PATIENCE => {
                            panic!("{} never drained", process.name)
                        }
                        None => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                };
                assert!(status.success(), "{} drained with {status}", process.name);
                process.restart();
                let name = process.name.clone();
                if role == Role::Gateway {
                    let address = mesh.addresses[at].clone();
                    until(PATIENCE, async || {
                        let ready = crate::support::http::get(&address, "/readyz").await;
                        ready.is_ok_and(|(status, _)| status == 200)
                    })
                    .await;
                    self.balancer.set(at, true);
                }
                format!("restart {name}")
            }
            Fault::Network { faults, hold } => {
                let at = self.next(Role::Node, mesh.proxies.len());
                mesh.proxies[at].set(faults);
                tokio::time::sleep(hold).await;
                mesh.proxies[at].set(Faults::default());
                format!("{faults:?} before node {at}")
            }
            Fault::Wire { harm, all, hold } => {
                let node = (!all).then(|| self.next(Role::Node, mesh.nodes.len()));
                let net = mesh.netns.as_ref().expect("nodes on hosts of their own");
                net.harm(harm, node);
                tokio::time::sleep(hold).await;
                let lost = net.heal();
                assert!(lost > 0 || matches!(harm, Harm::Thin(_)), "{harm:?} lost nothing");
                self.notes.push(format!("{harm:?}: {lost} packets lost"));
                format!("{harm:?} to node {node:?}")
            }
            Fault::Swizzle { hold } => {
                let clogged = Faults::both(Way { blackhole: true, ..Way::default() });
                // Never all: a mesh that nobody can reach has nothing to converge to.
                let mut victims: Vec<usize> = (0..mesh.proxies.len()).collect();
                for keep in 0..victims.len() {
                    let other = dice.below(victims.len());
                    victims.swap(keep, other);
                }
                let clogged_ones = 1 + dice.below(victims.len() - 1);
                victims.truncate(clogged_ones);
                for &victim in &victims {
                    mesh.proxies[victim].set(clogged);
                    tokio::time::sleep(hold / victims.len() as u32).await;
                }
                let first = dice.below(victims.len());
                victims.rotate_left(first);
                for &victim in &victims {
                    mesh.proxies[victim].set(Faults::default());
                    tokio::time::sleep(hold / 4).await;
                }
                format!("clogged {victims:?}")
            }
            Fault::Harm { direction, after, what } => {
                let at = self.next(Role::Node, mesh.proxies.len());
                let before = mesh.proxies[at].done();
                mesh.proxies[at].arm(direction, after, what);
                let proxy = &mesh.proxies[at];
                let hit = until(Duration::from_secs(5), async || proxy.done() > before);
                let hit = hit.await;
                proxy.disarm();
                if hit.is_none() {
                    self.notes.push(format!("no {what:?} {direction:?} after {after} bytes"));
                }
                format!("{what:?} {direction:?} after {after} bytes")
            }
            Fault::Etcd { gone, hold } => {
                let etcd = mesh.etcd.as_ref().expect("a mesh with etcd");
                if gone {
                    etcd.kill()
                } else {
                    etcd.stop()
                }
                tokio::time::sleep(hold).await;
                if gone {
                    etcd.restart()
                } else {
                    etcd.go_on()
                }
                format!("etcd {} for {hold:?}", if gone { "gone" } else { "stopped" })
            }
            Fault::Rotate => {
                rotate(mesh).await;
                "certificates rotated".to_owned()
            }
            Fault::Slow { percent, hold } => {
                let at = self.next(Role::Node, mesh.nodes.len());
                let node = &mesh.nodes[at];
                match Quota::set(node.id(), percent) {
                    Ok(quota) => {
                        tokio::time::sleep(hold).await;
                        drop(quota);
                        format!("{} at {percent} % of a CPU", node.name)
                    }
                    Err(why) => panic!("{why}"),
                }
            }
        }
    }

    /// The next of `count` processes of a role.
    fn next(&mut self, role: Role, count: usize) -> usize {
        let turn = &mut self.turns[role as usize];
        *turn += 1;
        (*turn - 1) % count
    }

    async fn pick<'m>(
        &mut self,
        role: Role,
        which: Which,
        mesh: &'m mut Sandbox,
        dice: &mut Dice,
    ) -> &'m mut Process {
        let at = self.choose(role, which, mesh, dice).await;
        &mut of(role, mesh)[at]
    }

    async fn choose(
        &mut self,
        role: Role,
        which: Which,
        mesh: &mut Sandbox,
        dice: &mut Dice,
    ) -> usize {
        let count = of(role, mesh).len();
        match which {
            Which::Random => dice.below(count),
            Which::Next => self.next(role, count),
            Which::Busiest => {
                let load = |status: &Option<proto::v1::RouterStatus>| {
                    status.as_ref().map_or(0, |status| status.running + status.waiting)
                };
                let all = statuses(mesh).await;
                (0..count).max_by_key(|&at| load(&all[at])).unwrap()
            }
        }
    }
}

/// Issues a certificate for every process, and waits until each has taken it over.
async fn rotate(mesh: &Sandbox) {
    let dir = mesh.certificates.as_ref().expect("a mesh with certificates");
    let sides = mesh.routers.iter().chain(&mesh.nodes).map(|process| {
        let side = Address::Unix(mesh.socket(&format!("{}-admin", process.name)));
        (process, side)
    });
    let all: Vec<_> = sides.chain(mesh.gateways.iter().zip(mesh.addresses.clone())).collect();
    let reloads = async |at: &Address| metric(at, "moemesh_tls_reloads_total").await;
    let mut before = Vec::new();
    for (process, at) in &all {
        before.push(reloads(at).await);
        let role = process.name.rsplit_once('-').unwrap().0;
        issue(dir, role, &process.name);
    }
    for ((process, at), before) in all.iter().zip(before) {
        let taken = until(PATIENCE, async || reloads(at).await > before).await;
        assert!(taken.is_some(), "{} never used its new certificate", process.name);
    }
}

fn of(role: Role, mesh: &mut Sandbox) -> &mut Vec<Process> {
    match role {
        Role::Node => &mut mesh.nodes,
        Role::Router => &mut mesh.routers,
        Role::Gateway => &mut mesh.gateways,
    }
}

/// Waits until sequences run, for a moment; how many there are.
async fn running(mesh: &Sandbox) -> u64 {
    let mut running = 0;
    for _ in 0..200 {
        let all = statuses(mesh).await;
        running = all.iter().flatten().map(|s| u64::from(s.running + s.waiting)).sum();
        if running > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    running
}

/// A process under SIGSTOP; it goes on when this is dropped, whatever happened.
pub struct Halted(u32);

impl Halted {
    pub fn stop(pid: u32) -> Self {
        signal(pid, "STOP");
        Self(pid)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        signal(self.0, "CONT");
    }
}
