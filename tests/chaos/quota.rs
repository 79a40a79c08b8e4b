//! A CPU quota on one process through cgroup v1, which needs root.

use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup/cpu";
const PERIOD_US: u32 = 10_000;

/// Taken back when dropped.
pub struct Quota {
    group: PathBuf,
    pid: u32,
}

impl Quota {
    /// Lets `pid` have `percent` of one CPU.
    ///
    /// # Errors
    /// Why this machine does not allow it.
    pub fn set(pid: u32, percent: u32) -> Result<Self, String> {
        let group = Path::new(ROOT).join(format!("moemesh-chaos-{}-{pid}", std::process::id()));
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| format!("no CPU quota here: {what}: {error}")
        };
        std::fs::create_dir(&group).map_err(failed("mkdir under /sys/fs/cgroup/cpu"))?;
        // From here on dropping it removes the group.
        let quota = Self { group, pid };
        let write = |file: &str, text: String| {
            std::fs::write(quota.group.join(file), text).map_err(failed(file))
        };
        write("cpu.cfs_period_us", PERIOD_US.to_string())?;
        write("cpu.cfs_quota_us", (PERIOD_US * percent / 100).to_string())?;
        write("cgroup.procs", pid.to_string())?;
        Ok(quota)
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Back to where everybody is; a process that is gone has left already.
        let _ = std::fs::write(Path::new(ROOT).join("cgroup.procs"), self.pid.to_string());
        let _ = std::fs::remove_dir(&self.group);
    }
}
