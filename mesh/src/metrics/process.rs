//! What the process itself uses: memory and CPU time, read from `/proc` when
//! somebody asks. Mapped weights are shared between the processes of a machine,
//! so next to the resident bytes stands the proportional share, which sums up.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// Reads this process's usage; what the system does not tell is left out.
#[derive(Debug)]
pub(super) struct Process;

/// Bytes, by the kernel's names (proc_pid_smaps(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    resident: i64,
    proportional: i64,
    anonymous: i64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        if let Some(memory) = memory(&rollup) {
            for (name, help, bytes) in [
                ("process_resident", "Memory in use, shared pages counted whole", memory.resident),
                (
                    "process_proportional",
                    "Memory in use, shared pages divided among their users",
                    memory.proportional,
                ),
                ("process_anonymous", "Memory in use that no file backs", memory.anonymous),
            ] {
                let gauge = ConstGauge::new(bytes);
                let unit = Unit::Bytes;
                let to = encoder.encode_descriptor(name, help, Some(&unit), gauge.metric_type())?;
                gauge.encode(to)?;
            }
        }
        let schedstat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        if let Some(seconds) = cpu_seconds(&schedstat) {
            let counter = ConstCounter::new(seconds);
            let unit = Unit::Seconds;
            let (name, help) = ("process_cpu", "CPU time used by all threads");
            let to = encoder.encode_descriptor(name, help, Some(&unit), counter.metric_type())?;
            counter.encode(to)?;
        }
        let lost = ConstCounter::new(crate::telemetry::lost());
        let (name, help) = ("process_lost_spans", "Spans that no trace collector got");
        lost.encode(encoder.encode_descriptor(name, help, None, lost.metric_type())?)
    }
}

/// The text of `/proc/self/smaps_rollup`.
fn memory(rollup: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<i64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(Memory {
        resident: field("Rss")?,
        proportional: field("Pss")?,
        anonymous: field("Anonymous")?,
    })
}

/// User and system time of `/proc/self/stat`, whose second field may hold anything in brackets.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    // Fields 14 and 15 of proc_pid_stat(5); the first after the name is number 3.
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn the_kernels_texts_are_read() {
        let rollup = "55d0-7ffc ---p 0 00:00 0 [rollup]\nRss:      2048 kB\nPss:      512 kB\n\
                      Pss_Dirty:  4 kB\nAnonymous:   100 kB\n";
        let want = Memory { resident: 2 << 20, proportional: 512 << 10, anonymous: 100 << 10 };
        assert_eq!(memory(rollup), Some(want));
        assert_eq!(memory("Rss: many\n"), None);
        let ticks = rustix::param::clock_ticks_per_second();
        let stat = format!("1 (a) b) S 1 1 1 0 -1 0 0 0 0 0 {} {} 0 0", 2 * ticks, ticks);
        assert_eq!(cpu_seconds(&stat), Some(3.0));
        assert_eq!(cpu_seconds(""), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_scrape_tells_what_this_process_uses() {
        let text = Metrics::default().encode();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect(name);
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let resident = value("moemesh_process_resident_bytes ");
        assert!(resident > 1e6 && resident >= value("moemesh_process_proportional_bytes "));
        assert!(value("moemesh_process_anonymous_bytes ") <= resident);
        assert!(value("moemesh_process_cpu_seconds_total ") >= 0.0);
    }
}
