//! Keeps one process of a local mesh running: starts it, shows what it writes,
//! starts it again when it dies, and stops it when told. A process that cannot
//! work (bad configuration, bad checkpoint, never ready) is given up on, with the
//! line it left as the reason.
//!
//! The child holds the other end of a pipe on its standard input and ends when
//! that closes, so it cannot outlive a killed parent.

use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::exit;
use crate::up::console::Console;
use crate::up::lines::{ERROR_MARK, Lines};
use crate::up::plan::Planned;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A process that lived this long starts over with the shortest pause.
const LIVED_WELL: Duration = Duration::from_secs(10);
/// Deaths before the first readiness after which a process is given up on.
const MOST_EARLY_DEATHS: u32 = 3;
/// How long what a dead process wrote is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Terminate,
    Kill,
}

/// How a process ended after it was told to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    Cleanly,
    /// It had to be killed, or ended in another way than by finishing.
    Otherwise(String),
}

/// Hold on a process that is being kept.
pub struct Keeper {
    pub planned: Planned,
    ready: Arc<AtomicBool>,
    orders: watch::Sender<Order>,
    task: JoinHandle<Stopped>,
}

impl Keeper {
    /// Starts keeping `planned`. The reason for giving up, if it comes to that,
    /// is sent to `given_up`. `place` picks the colour of its log lines.
    pub fn start(
        planned: Planned,
        place: usize,
        console: Console,
        given_up: mpsc::Sender<String>,
    ) -> Self {
        let ready = Arc::new(AtomicBool::new(false));
        let (orders, heard) = watch::channel(Order::Run);
        let care = Care { planned: planned.clone(), place, console, ready: ready.clone(), heard };
        let task = tokio::spawn(care.keep(given_up));
        Self { planned, ready, orders, task }
    }

    /// It answered that it is ready: from now on its deaths are accidents.
    pub fn mark_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    /// Asks it to drain and end; kills it after `grace`.
    pub async fn stop(mut self, grace: Duration) -> Stopped {
        self.orders.send_replace(Order::Terminate);
        let ended = match tokio::time::timeout(grace, &mut self.task).await {
            Ok(ended) => ended,
            Err(_) => {
                self.orders.send_replace(Order::Kill);
                self.task.await
            }
        };
        ended.unwrap_or_else(|error| Stopped::Otherwise(error.to_string()))
    }
}

struct Care {
    planned: Planned,
    place: usize,
    console: Console,
    ready: Arc<AtomicBool>,
    heard: watch::Receiver<Order>,
}

impl Care {
    async fn keep(mut self, given_up: mpsc::Sender<String>) -> Stopped {
        let id = self.planned.id.clone();
        let mut pause = FIRST_PAUSE;
        let mut early_deaths = 0;
        loop {
            let born = Instant::now();
            let mut running = match self.spawn() {
                Ok(running) => running,
                Err(error) => {
                    let _ = given_up.try_send(format!("cannot start {id}: {error}"));
                    return Stopped::Otherwise("could not be started".to_owned());
                }
            };
            let died = tokio::select! {
                died = running.child.wait() => died,
                () = ordered(&mut self.heard) => return self.stop(running).await,
            };
            let how = describe(&died);
            let last = running.last_words().await;
            let why = last.map_or_else(|| how.clone(), |words| format!("{how}: {words}"));

            let was_ready = self.ready.load(Ordering::Relaxed);
            early_deaths += u32::from(!was_ready);
            let code = died.as_ref().ok().and_then(ExitStatus::code);
            if is_hopeless(code, was_ready, early_deaths) {
                let _ = given_up.try_send(format!("{id} {why}"));
                return Stopped::Otherwise(how);
            }
            if born.elapsed() > LIVED_WELL {
                pause = FIRST_PAUSE;
            }
            self.console.warn(&format!("{id} {why}; starting it again in {pause:?}"));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = ordered(&mut self.heard) => return Stopped::Cleanly,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn spawn(&self) -> std::io::Result<Running> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(self.planned.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C in the terminal is for `up` alone, which then stops the rest in order.
            .process_group(0)
            .kill_on_drop(true);
        for (variable, _) in std::env::vars_os() {
            // They are part of the child's file already, checked against the plan.
            if variable.to_string_lossy().starts_with("MOEMESH_") {
                command.env_remove(variable);
            }
        }
        let mut child = command.spawn()?;
        // Waiting for a child closes a stdin that it still holds.
        let alive = child.stdin.take();
        let out = child.stdout.take().map(|pipe| self.follow(Lines::new(pipe)));
        let err = child.stderr.take().map(|pipe| self.follow(Lines::new(pipe)));
        Ok(Running { child, out, err, _alive: alive })
    }

    /// Shows the lines of one pipe until it closes. Returns the last one that
    /// says why the process ends.
    fn follow<R>(&self, mut lines: Lines<R>) -> JoinHandle<Option<String>>
    where
        R: tokio::io::AsyncRead + Unpin + Send + 'static,
    {
        let (console, id, place) = (self.console.clone(), self.planned.id.clone(), self.place);
        tokio::spawn(async move {
            let mut reason = None;
            while let Some(line) = lines.next().await {
                match line.strip_prefix(ERROR_MARK) {
                    Some(rest) => reason = Some(rest.to_owned()),
                    None => console.log(&id, place, &line),
                }
            }
            reason
        })
    }

    async fn stop(mut self, mut running: Running) -> Stopped {
        let asked = *self.heard.borrow();
        if asked == Order::Terminate {
            running.signal(Signal::TERM);
            let ended = tokio::select! {
                ended = running.child.wait() => Some(ended),
                _ = self.heard.wait_for(|&order| order == Order::Kill) => None,
            };
            if let Some(ended) = ended {
                let words = running.last_words().await;
                return match (&ended, words) {
                    (Ok(status), _) if status.success() => Stopped::Cleanly,
                    (_, None) => Stopped::Otherwise(describe(&ended)),
                    (_, Some(words)) => {
                        Stopped::Otherwise(format!("{}: {words}", describe(&ended)))
                    }
                };
            }
        }
        // Fails only when it is dead already.
        let _ = running.child.kill().await;
        Stopped::Otherwise("did not end in time and was killed".to_owned())
    }
}

struct Running {
    child: Child,
    out: Option<JoinHandle<Option<String>>>,
    err: Option<JoinHandle<Option<String>>>,
    /// Its closing tells the child that this process is gone.
    _alive: Option<ChildStdin>,
}

impl Running {
    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // Fails only when it is dead already, which the wait notices.
            let _ = kill_process(pid, signal);
        }
    }

    /// The reason that the dead process gave. Also lets its last lines be shown.
    async fn last_words(&mut self) -> Option<String> {
        let mut reason = None;
        for pipe in [self.out.take(), self.err.take()].into_iter().flatten() {
            if let Ok(Ok(Some(found))) = tokio::time::timeout(LAST_WORDS, pipe).await {
                reason = Some(found);
            }
        }
        reason
    }
}

/// Resolves when there is an order to stop.
async fn ordered(heard: &mut watch::Receiver<Order>) {
    // An error means that the keeper was dropped: nobody wants the process any more.
    let _ = heard.wait_for(|&order| order != Order::Run).await;
}

/// Whether starting it again would only repeat what happened.
fn is_hopeless(code: Option<i32>, was_ready: bool, early_deaths: u32) -> bool {
    let told = code.is_some_and(|code| exit::IN_VAIN.contains(&code));
    told || (!was_ready && early_deaths >= MOST_EARLY_DEATHS)
}

fn describe(died: &std::io::Result<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match died {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("is lost: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_only_fail_again_is_given_up() {
        assert!(is_hopeless(Some(64), true, 0), "bad configuration");
        assert!(is_hopeless(Some(65), false, 1), "bad checkpoint");
        assert!(!is_hopeless(Some(1), false, 1));
        assert!(!is_hopeless(None, false, 2), "killed by a signal");
        assert!(is_hopeless(None, false, 3), "never ready");
        assert!(!is_hopeless(Some(101), true, 3), "a panic of one that had been ready");
    }
}
