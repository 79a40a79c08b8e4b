//! What it costs to share a job between the pool's threads.

use kernels::Pool;
use std::hint::{black_box, spin_loop};
use std::thread;
use std::time::{Duration, Instant};

/// Jobs of a measurement.
const JOBS: usize = 2000;

/// Prints, for jobs that follow each other after various pauses, how long an empty one takes and how much
/// of a CPU the threads use meanwhile.
pub fn report() {
    let threads = thread::available_parallelism().map_or(1, usize::from).clamp(2, 8);
    let pool = Pool::new(threads);
    println!("pool of {threads} threads: an empty job of {threads} tasks");
    println!("pause, busy    median us   90 % us   CPU seconds a second");
    for (pause, busy) in [(0, true), (5, true), (20, true), (50, true), (200, true), (1000, false)]
    {
        let pause = Duration::from_micros(pause);
        let (start, cpu) = (Instant::now(), cpu_time());
        let jobs = if busy { JOBS } else { JOBS / 4 };
        let mut times: Vec<Duration> = (0..jobs)
            .map(|_| {
                let start = Instant::now();
                if busy {
                    while start.elapsed() < pause {
                        spin_loop();
                    }
                } else {
                    thread::sleep(pause);
                }
                let start = Instant::now();
                pool.run(threads, &|i| {
                    black_box(i);
                });
                start.elapsed()
            })
            .collect();
        let share = (cpu_time() - cpu) / start.elapsed().as_secs_f64();
        times.sort();
        let micros = |part: usize| times[times.len() * part / 100].as_secs_f64() * 1e6;
        println!(
            "{:6} us {:5} {:10.2} {:9.2} {share:12.2}",
            pause.as_micros(),
            if busy { "yes" } else { "no" },
            micros(50),
            micros(90),
        );
    }
    println!();
}

/// Seconds all threads of the process have been on a CPU; not a number where the system does not say.
fn cpu_time() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return f64::NAN };
    // User and system time, in hundredths of a second, are the 14th and 15th field; the name before may hold spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}
