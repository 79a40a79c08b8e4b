//! The load: requests that are the same in every run, in a closed loop (every
//! stream asks again when its answer is complete) or an open one (requests arrive
//! when they arrive), and when each piece of an answer came.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::task::JoinSet;

use crate::bench::stats::{Random, Times, arrivals};
use crate::client::ClientError;
use crate::client::http::Server;
use crate::client::openai::{Ask, Prompt, Summary, complete};

/// A server, and how it is asked.
#[derive(Debug)]
pub struct Target {
    server: Server,
    model: String,
    /// Prompts are made of token ids below this.
    vocab: u32,
    /// It takes prompts as text only.
    text: bool,
}

/// How long prompts and answers are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub prompt: Length,
    pub answer: Length,
}

/// A number of tokens, or a range of them with even chances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    least: usize,
    most: usize,
}

impl Length {
    pub const fn exactly(tokens: usize) -> Self {
        Self { least: tokens, most: tokens }
    }

    pub fn most(self) -> usize {
        self.most
    }

    fn draw(self, random: &mut Random) -> usize {
        self.least + random.below((self.most - self.least) as u64 + 1) as usize
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.least == self.most {
            true => write!(f, "{}", self.most),
            false => write!(f, "{}..{}", self.least, self.most),
        }
    }
}

impl std::str::FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|&number| number > 0);
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        match (number(least), number(most)) {
            (Some(least), Some(most)) if least <= most => Ok(Self { least, most }),
            _ => Err(format!("`{text}` is neither a number of tokens nor a range such as 32..512")),
        }
    }
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub summary: Summary,
    /// When each piece of text came.
    pub pieces: Vec<Instant>,
}

impl Target {
    /// Asks once, which pays for pages and connections that later requests find ready,
    /// and finds out whether the server takes token ids.
    pub async fn open(server: Server, model: String, vocab: u32) -> Result<Self, ClientError> {
        let mut target = Self { server, model, vocab: vocab.max(2), text: false };
        let shape = Shape { prompt: Length::exactly(16), answer: Length::exactly(8) };
        match target.ask(0, shape).await {
            Err(ClientError::Refused { .. }) => {
                target.text = true;
                target.ask(0, shape).await?;
            }
            done => drop(done?),
        }
        Ok(target)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn takes_ids(&self) -> bool {
        !self.text
    }

    /// Asks request number `key`.
    pub async fn ask(&self, key: u64, shape: Shape) -> Result<Answer, ClientError> {
        let mut pieces = Vec::new();
        let ask = self.request(key, shape);
        let summary = complete::<ClientError>(&self.server, &ask, |_| {
            pieces.push(Instant::now());
            Ok(())
        })
        .await?;
        Ok(Answer { summary, pieces })
    }

    /// Asks request number `key` and tells of each piece as it comes.
    pub async fn follow(
        &self,
        key: u64,
        shape: Shape,
        mut piece: impl FnMut(Instant),
    ) -> Result<Summary, ClientError> {
        let ask = self.request(key, shape);
        complete::<ClientError>(&self.server, &ask, |_| {
            piece(Instant::now());
            Ok(())
        })
        .await
    }

    fn request(&self, key: u64, shape: Shape) -> Ask {
        let mut random = Random::new(key);
        let ids = |random: &mut Random, count| -> Vec<u32> {
            (0..count).map(|_| random.below(u64::from(self.vocab)) as u32).collect()
        };
        let length = shape.prompt.draw(&mut random);
        let prompt = ids(&mut random, length);
        let prompt = match self.text {
            true => Prompt::Text(words(&prompt)),
            false => Prompt::Tokens(prompt),
        };
        Ask {
            model: self.model.clone(),
            prompt,
            max_tokens: shape.answer.draw(&mut random) as u32,
            temperature: Some(0.0),
            seed: None,
            ignore_eos: true,
        }
    }
}

/// About as many tokens of text as there are ids. The server's own count decides.
fn words(ids: &[u32]) -> String {
    let letter = |n: u32| char::from(b'a' + (n % 26) as u8);
    ids.iter().map(|&id| format!(" {}{}", letter(id), letter(id / 26))).collect()
}

impl Answer {
    /// Times between one piece and the next.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.pieces.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// What a load came to.
#[derive(Debug)]
pub struct Done {
    pub answers: Vec<Answer>,
    pub wall: Duration,
}

impl Done {
    pub fn tokens(&self) -> u64 {
        self.answers.iter().map(|answer| answer.summary.completion_tokens).sum()
    }

    pub fn prompt_tokens(&self) -> u64 {
        self.answers.iter().map(|answer| answer.summary.prompt_tokens).sum()
    }

    pub fn ttft(&self) -> Times {
        Times::new(self.answers.iter().map(|answer| answer.summary.first))
    }

    pub fn tpot(&self) -> Times {
        Times::new(self.answers.iter().filter_map(|answer| answer.summary.per_token()))
    }

    pub fn itl(&self) -> Times {
        Times::new(self.answers.iter().flat_map(Answer::gaps))
    }

    /// Tokens a second while all answers were being written: from when the last one
    /// began to when the first one ended. `None` if that was no time worth measuring.
    pub fn together(&self) -> Option<f64> {
        let begun = self.answers.iter().map(|answer| answer.pieces.first()).max()??;
        let ended = self.answers.iter().map(|answer| answer.pieces.last()).min()??;
        let window = ended.checked_duration_since(*begun)?.as_secs_f64();
        let pieces = self.answers.iter().flat_map(|answer| &answer.pieces);
        let within = pieces.clone().filter(|&at| at > begun && at <= ended).count();
        let all = pieces.count();
        // Half of what was asked for at least: less would be chance.
        let enough = window > 0.0 && within * 2 >= all;
        // A piece may be of several tokens.
        enough.then(|| within as f64 / window * self.tokens() as f64 / all as f64)
    }
}

/// `streams` streams of `requests` requests each, numbered from `first` on.
pub async fn closed(
    target: Arc<Target>,
    first: u64,
    streams: usize,
    requests: usize,
    shape: Shape,
) -> anyhow::Result<Done> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for stream in 0..streams {
        let target = target.clone();
        running.spawn(async move {
            let mut answers = Vec::with_capacity(requests);
            for request in 0..requests {
                let key = first + (stream * requests + request) as u64;
                answers.push(target.ask(key, shape).await?);
            }
            Ok(answers)
        });
    }
    let answers = finished(running).await?.into_iter().flatten().collect();
    Ok(Done { answers, wall: began.elapsed() })
}

/// `requests` requests, numbered from `first` on, that arrive at `rate` a second
/// whatever has been answered.
pub async fn open(
    target: Arc<Target>,
    first: u64,
    rate: f64,
    requests: usize,
    shape: Shape,
    seed: u64,
) -> anyhow::Result<Done> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for (key, at) in (first..).zip(arrivals(rate, requests, seed)) {
        tokio::time::sleep_until((began + at).into()).await;
        let target = target.clone();
        running.spawn(async move { target.ask(key, shape).await });
    }
    let answers = finished(running).await?;
    Ok(Done { answers, wall: began.elapsed() })
}

async fn finished<T: 'static>(
    mut running: JoinSet<Result<T, ClientError>>,
) -> anyhow::Result<Vec<T>> {
    let mut all = Vec::new();
    while let Some(done) = running.join_next().await {
        all.push(done.context("a stream of the benchmark failed")??);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: bool) -> Target {
        let server = Server::from_url("http://127.0.0.1:1", None).unwrap();
        Target { server, model: "m".to_owned(), vocab: 300, text }
    }

    #[test]
    fn requests_differ_from_each_other_and_not_between_runs() {
        let shape = Shape { prompt: "4..64".parse().unwrap(), answer: Length::exactly(5) };
        let prompt = |key| match target(false).request(key, shape).prompt {
            Prompt::Tokens(ids) => ids,
            other => panic!("{other:?}"),
        };
        assert_eq!(prompt(1), prompt(1));
        assert_ne!(prompt(1)[..4], prompt(2)[..4]);
        let lengths: Vec<usize> = (0..200).map(|key| prompt(key).len()).collect();
        assert!(lengths.iter().all(|length| (4..=64).contains(length)));
        assert!(lengths.iter().min() < Some(&10) && lengths.iter().max() > Some(&58));
        assert!(prompt(3).iter().all(|&id| id < 300));
        assert!(matches!(target(true).request(1, shape).prompt, Prompt::Text(_)));
        assert_eq!(target(false).request(1, shape).max_tokens, 5);
    }

    #[test]
    fn lengths_are_numbers_or_ranges() {
        for text in ["7", "7..9"] {
            assert_eq!(text.parse::<Length>().unwrap().to_string(), text);
        }
        for text in ["", "0", "9..7", "a..b", "-1"] {
            assert!(text.parse::<Length>().unwrap_err().contains(&format!("`{text}`")));
        }
    }

    #[test]
    fn streams_are_counted_while_all_of_them_run() {
        let start = Instant::now();
        let answer = |from: u64, to: u64| Answer {
            summary: Summary { completion_tokens: to - from + 1, ..Summary::default() },
            pieces: (from..=to).map(|ms| start + Duration::from_millis(10 * ms)).collect(),
        };
        let done = |answers| Done { answers, wall: Duration::from_secs(1) };
        // Both run from 20 ms to 100 ms: eight pieces each.
        let rate = done(vec![answer(0, 10), answer(2, 12)]).together().unwrap();
        assert!((rate - 200.0).abs() < 1e-6, "{rate}");
        let one = done(vec![answer(0, 10)]).together().unwrap();
        assert!((one - 100.0).abs() < 1e-6, "{one}");
        assert_eq!(done(vec![answer(0, 3), answer(5, 9)]).together(), None, "one after the other");
        assert_eq!(done(vec![answer(0, 10), answer(9, 19)]).together(), None, "hardly together");
        assert_eq!(done(vec![]).together(), None);
    }
}
