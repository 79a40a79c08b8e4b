//! Expert nodes on hosts of their own: each in a network namespace, with one more between
//! them and this machine that forwards packets, and loses or slows them as told (nftables,
//! tc). Needs root. What is lost here is lost to both ends, as on a real wire.

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// What the network does to packets between this machine and nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Nothing arrives at the node.
    To,
    /// Nothing arrives from it.
    From,
    /// Neither.
    Cut,
    /// So many percent are lost, each way.
    Lossy(u32),
    /// Megabits a second, each way.
    Thin(u32),
}

/// Gone with its namespaces when dropped.
pub struct Netns {
    /// Of all its names.
    name: String,
    /// The first three numbers of its addresses, from the range for benchmarks (RFC 2544).
    prefix: String,
    count: usize,
}

impl Netns {
    /// Namespaces for `count` nodes; none where this machine cannot have them.
    pub fn start(count: usize) -> Option<Arc<Self>> {
        let pid = std::process::id();
        let (name, prefix) = (format!("moe{pid}"), format!("198.18.{}", pid % 256));
        let net = Self { name, prefix, count };
        match net.build() {
            Ok(()) => Some(Arc::new(net)),
            Err(why) => {
                println!("left out: no network namespaces with nftables and tc here: {why}");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        let (wire, prefix) = (&self.name, &self.prefix);
        let mut script = format!(
            "nft --version; tc -V; ip netns add {wire}
             ip link add {wire} type veth peer name out netns {wire}
             ip addr add {prefix}.1/30 dev {wire}; ip link set {wire} up
             ip -n {wire} addr add {prefix}.2/30 dev out; ip -n {wire} link set out up
             ip route add {prefix}.0/24 via {prefix}.2
             ip netns exec {wire} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
             ip netns exec {wire} nft 'add table ip moe'
             ip netns exec {wire} nft \
             'add chain ip moe wire {{ type filter hook forward priority 0; }}'\n"
        );
        for node in 0..self.count {
            let (own, near, far) = (self.of(node), self.host(node, 1), self.host(node, 2));
            let _ = write!(
                script,
                "ip netns add {own}; ip -n {wire} link add n{node} type veth peer name e0 netns {own}
                 ip -n {wire} addr add {near}/30 dev n{node}; ip -n {wire} link set n{node} up
                 ip -n {own} addr add {far}/30 dev e0; ip -n {own} link set e0 up
                 ip -n {own} link set lo up; ip -n {own} route add default via {near}\n"
            );
        }
        sh(&script).map(drop)
    }

    fn host(&self, node: usize, end: usize) -> String {
        format!("{}.{}", self.prefix, 4 * (node + 1) + end)
    }

    /// The namespace of a node.
    pub fn of(&self, node: usize) -> String {
        format!("{}n{node}", self.name)
    }

    /// Where a node listens.
    pub fn address(&self, node: usize) -> String {
        format!("{}:7001", self.host(node, 2))
    }

    /// Does it to the packets of one node, or to those of all.
    pub fn harm(&self, harm: Harm, node: Option<usize>) {
        let (wire, mut script) = (&self.name, String::new());
        for at in (0..self.count).filter(|at| node.is_none_or(|node| node == *at)) {
            let (host, own) = (self.host(at, 2), self.of(at));
            let drop = |way: &str, when: &str| {
                format!(
                    "ip netns exec {wire} nft 'add rule ip moe wire ip {way} {host} {when} \
                     counter drop'\n"
                )
            };
            script += &match harm {
                Harm::To => drop("daddr", ""),
                Harm::From => drop("saddr", ""),
                Harm::Cut => drop("daddr", "") + &drop("saddr", ""),
                Harm::Lossy(percent) => {
                    let when = format!("numgen random mod 100 < {percent}");
                    drop("daddr", &when) + &drop("saddr", &when)
                }
                Harm::Thin(rate) => {
                    let queue = format!("root tbf rate {rate}mbit burst 16kb latency 50ms");
                    format!(
                        "tc -n {wire} qdisc add dev n{at} {queue}\n\
                         tc -n {own} qdisc add dev e0 {queue}\n"
                    )
                }
            };
        }
        sh(&script).unwrap();
    }

    /// Takes it back; how many packets were lost.
    pub fn heal(&self) -> u64 {
        let wire = &self.name;
        let rules = sh(&format!("ip netns exec {wire} nft list chain ip moe wire")).unwrap();
        let words: Vec<&str> = rules.split_whitespace().collect();
        let counts = words.windows(2).filter(|pair| pair[0] == "packets");
        let lost = counts.map(|pair| pair[1].parse::<u64>().unwrap()).sum();
        let mut script = format!("ip netns exec {wire} nft flush chain ip moe wire\n");
        for node in 0..self.count {
            let own = self.of(node);
            // Nothing to take back where there is none.
            let _ = writeln!(script, "tc -n {wire} qdisc del dev n{node} root 2>/dev/null || true");
            let _ = writeln!(script, "tc -n {own} qdisc del dev e0 root 2>/dev/null || true");
        }
        sh(&script).unwrap();
        lost
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Whatever of it there is.
        let wire = &self.name;
        let mut script = format!("ip link del {wire}; ip netns del {wire}\n");
        for node in 0..self.count {
            let _ = writeln!(script, "ip netns del {}", self.of(node));
        }
        let _ = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

/// Runs a script to its end or its first failure; what it says.
fn sh(script: &str) -> Result<String, String> {
    let ran = Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| error.to_string())?;
    if !ran.status.success() {
        return Err(String::from_utf8_lossy(&ran.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}
