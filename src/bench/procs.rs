//! What processes cost, from `/proc`: CPU time and memory of a tree of processes,
//! and how busy the machine is beside them. Elsewhere than on Linux there is
//! nothing to read, and the columns stay empty.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::config::roles::Role;

const KIB: f64 = 1024.0 / 1e6;

/// One process.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    /// Its role and place in a mesh, such as `router-0`, or the program's name.
    pub name: String,
    /// Seconds on a CPU, in user and kernel mode.
    pub cpu: f64,
}

/// Every process that descends from `root`, itself left out.
pub fn below(root: u32) -> Vec<Process> {
    let all = all();
    let mut wanted = vec![root];
    let mut found = Vec::new();
    while let Some(parent) = wanted.pop() {
        for process in all.iter().filter(|process| process.parent == parent) {
            wanted.push(process.pid);
            found.push(process.clone());
        }
    }
    found
}

/// `root` and every process that descends from it.
pub fn tree(root: u32) -> Vec<Process> {
    read(root).into_iter().chain(below(root)).collect()
}

/// The processes of the meshes that this process started.
pub fn own_mesh() -> Vec<Process> {
    let mesh = below(std::process::id());
    mesh.into_iter().filter(|process| role(&process.name).is_some()).collect()
}

/// The role in the name of a mesh's process.
fn role(name: &str) -> Option<Role> {
    let (role, place) = name.rsplit_once('-')?;
    place.parse::<u32>().ok()?;
    Role::ALL.into_iter().find(|known| known.name() == role)
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(read).collect()
}

fn read(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (parent, cpu) = parse_stat(&stat)?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let arguments: Vec<&str> = line.split('\0').collect();
    Some(Process { pid, parent, name: name(&arguments), cpu })
}

/// A process of a mesh is named after its configuration file, another one after
/// its program.
fn name(arguments: &[&str]) -> String {
    let file = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let config = arguments.windows(2).find(|pair| pair[0] == "--config").map(|pair| file(pair[1]));
    let id = config.and_then(|config| Some(config.strip_suffix(".toml")?.to_owned()));
    id.filter(|id| role(id).is_some())
        .unwrap_or_else(|| file(arguments.first().copied().unwrap_or_default()))
}

/// Parent and CPU seconds of a `/proc/<pid>/stat`. The program's name comes second,
/// in parentheses, and may hold anything.
fn parse_stat(stat: &str) -> Option<(u32, f64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let parent = u32::try_from(number(1)?).ok()?;
    Some((parent, (number(11)? + number(12)?) as f64 / ticks()))
}

/// Memory of processes in MB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Sum of each one's largest resident set; pages that several map count in each.
    pub peak_rss: f64,
    /// Sum of proportional set sizes: a page shared by two counts half in each.
    pub pss: f64,
}

impl Memory {
    pub fn of(processes: &[Process]) -> Self {
        processes.iter().fold(Self::default(), |sum, process| {
            let value = |file: &str, key: &str| {
                let text = fs::read_to_string(format!("/proc/{}/{file}", process.pid));
                text.ok().and_then(|text| kib(&text, key)).unwrap_or_default() * KIB
            };
            Self {
                peak_rss: sum.peak_rss + value("status", "VmHWM:"),
                pss: sum.pss + value("smaps_rollup", "Pss:"),
            }
        })
    }

    /// The larger of each.
    pub fn max(self, other: Self) -> Self {
        Self { peak_rss: self.peak_rss.max(other.peak_rss), pss: self.pss.max(other.pss) }
    }

    pub fn json(self) -> Value {
        json!({ "peak_rss_mb": self.peak_rss, "pss_mb": self.pss })
    }
}

/// The number in a line `key   123 kB`.
fn kib(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// CPU time from a moment on: of some processes, and of all others.
#[derive(Debug)]
pub struct Meter {
    began: Instant,
    processes: BTreeMap<u32, f64>,
    busy: f64,
}

/// What a [`Meter`] counted.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// CPU seconds of each process that was counted and still lives, by name.
    pub cpu: Vec<(String, f64)>,
    /// Share of the machine's CPU time that other processes took.
    pub others: f64,
}

impl Meter {
    /// Starts counting; this process counts too, as it makes the load.
    pub fn start(processes: &[Process]) -> Self {
        let counted = processes.iter().cloned().chain(read(std::process::id()));
        Self {
            began: Instant::now(),
            processes: counted.map(|process| (process.pid, process.cpu)).collect(),
            busy: busy(),
        }
    }

    pub fn stop(&self) -> Usage {
        let wall = self.began.elapsed().as_secs_f64();
        let used = (busy() - self.busy).max(0.0);
        let now = self.processes.iter().filter_map(|(&pid, before)| {
            let now = read(pid)?;
            Some((pid, now.name, (now.cpu - before).max(0.0)))
        });
        let now: Vec<(u32, String, f64)> = now.collect();
        let ours: f64 = now.iter().map(|(.., cpu)| cpu).sum();
        let machine = wall * online() as f64;
        let own = std::process::id();
        let cpu = now.into_iter().filter(|(pid, ..)| *pid != own);
        Usage {
            cpu: cpu.map(|(_, name, cpu)| (name, cpu)).collect(),
            others: if machine > 0.0 { ((used - ours) / machine).max(0.0) } else { 0.0 },
        }
    }
}

/// Units of `/proc`'s CPU times in a second.
fn ticks() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// CPU seconds that all processes together have used, and what was taken away
/// from this machine by others on the same host.
fn busy() -> f64 {
    parse_busy(&fs::read_to_string("/proc/stat").unwrap_or_default()).unwrap_or_default()
}

fn parse_busy(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<f64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already
    let all: f64 = fields.iter().take(8).sum();
    Some((all - fields.get(3)? - fields.get(4)?) / ticks())
}

/// CPUs of the machine, whichever of them this process may use.
fn online() -> usize {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let per_cpu = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    stat.lines().filter(per_cpu).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "42 (a) b) (c) S 7 42 42 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 3 0 100 1 1";
        assert_eq!(parse_stat(stat), Some((7, 2.0)));
        assert_eq!(parse_stat("42 (x) S"), None);
        let role = ["/bin/moemesh", "router", "--config", "/run/m/router-0.toml", ""];
        assert_eq!(name(&role), "router-0");
        assert_eq!(name(&["/opt/llama-server", "--config", "x.toml"]), "llama-server");
        assert_eq!(name(&[]), "");
    }

    #[test]
    fn children_are_found_and_measured() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let sleeper = loop {
            // Until it has become the program, it has the name of this one.
            let found = below(std::process::id()).into_iter().find(|p| p.pid == child.id());
            if let Some(sleeper) = found.filter(|process| process.name == "sleep") {
                break sleeper;
            }
        };
        let sleeper = &sleeper;
        assert!(Memory::of(std::slice::from_ref(sleeper)).peak_rss > 0.1);
        let meter = Meter::start(std::slice::from_ref(sleeper));
        let usage = meter.stop();
        assert!(usage.cpu.len() == 1 && usage.cpu[0].1 < 1.0, "{usage:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(tree(child.id()).is_empty());
    }

    #[test]
    fn machine_and_memory_lines_are_understood() {
        let stat = "cpu  100 50 50 1000 20 0 0 100 7 0\ncpu0 1 1\n";
        assert_eq!(parse_busy(stat), Some(3.0));
        assert_eq!(kib("VmPeak:\t 9 kB\nVmHWM:\t 2000 kB\n", "VmHWM:"), Some(2000.0));
        assert_eq!(kib("", "Pss:"), None);
        let (a, b) = (Memory { peak_rss: 1.0, pss: 4.0 }, Memory { peak_rss: 2.0, pss: 3.0 });
        assert_eq!(a.max(b), Memory { peak_rss: 2.0, pss: 4.0 });
    }
}
