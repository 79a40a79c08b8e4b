//! Choices, draws, filters, penalties and log-probabilities.

use super::*;

fn scratch() -> Scratch {
    Scratch::new(Kernels::detect())
}

fn chosen(logits: &[f32], params: &Params, history: &History, position: u64) -> u32 {
    let mut logits = logits.to_vec();
    sample(&mut logits, params, history, position, &scratch()).unwrap().token
}

/// How often each token is drawn at 4000 positions.
fn histogram(logits: &[f32], params: &Params) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    let scratch = scratch();
    for position in 0..4000 {
        let mut logits = logits.to_vec();
        let history = History::default();
        let choice = sample(&mut logits, params, &history, position, &scratch).unwrap();
        counts[choice.token as usize] += 1;
    }
    counts
}

fn support(logits: &[f32], params: &Params) -> Vec<usize> {
    let counts = histogram(logits, params);
    (0..counts.len()).filter(|i| counts[*i] > 0).collect()
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_of_equals() {
    let none = History::default();
    assert_eq!(chosen(&[0.0, 3.0, 2.0, 3.0], &Params::greedy(), &none, 0), 1);
    assert_eq!(chosen(&[-5.0], &Params::greedy(), &none, 0), 0);
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [1f32, 2.0, 4.0, 1.0].map(f32::ln);
    let counts = histogram(&logits, &Params::default());
    for (count, expected) in counts.iter().zip([500.0, 1000.0, 2000.0, 500.0]) {
        assert!((f64::from(*count) - expected).abs() < 120.0, "{counts:?}");
    }
    let counts = histogram(&logits, &Params { temperature: 0.5, ..Params::default() });
    assert!((f64::from(counts[2]) - 4000.0 * 16.0 / 22.0).abs() < 150.0, "{counts:?}");
}

#[test]
fn draws_are_a_function_of_seed_and_position() {
    let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
    let run = |seed| -> Vec<u32> {
        let params = Params { seed, ..Params::default() };
        (0..40).map(|p| chosen(&logits, &params, &History::default(), p)).collect()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert!(run(1).windows(2).any(|w| w[0] != w[1]));
}

#[test]
fn every_instruction_set_draws_the_same() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 0.01).collect();
    let params = Params { temperature: 0.8, top_p: 0.95, ..Params::default() };
    let run = |isa| -> Vec<u32> {
        let scratch = Scratch::new(Kernels::new(isa));
        let mut one = |position| {
            let mut logits = logits.clone();
            sample(&mut logits, &params, &History::default(), position, &scratch).unwrap().token
        };
        (0..50).map(&mut one).collect()
    };
    for isa in kernels::Isa::available() {
        assert_eq!(run(isa), run(kernels::Isa::Scalar));
    }
}

#[test]
fn filters_keep_what_they_say() {
    let logits = [8f32, 4.0, 2.0, 1.0, 1.0].map(f32::ln);
    let base = Params::default();
    assert_eq!(support(&logits, &base), [0, 1, 2, 3, 4]);
    assert_eq!(support(&logits, &Params { top_k: 2, ..base.clone() }), [0, 1]);
    assert_eq!(support(&logits, &Params { top_k: 4, ..base.clone() }), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &Params { top_k: 99, ..base.clone() }), [0, 1, 2, 3, 4]);
    assert_eq!(support(&logits, &Params { top_p: 0.49, ..base.clone() }), [0]);
    assert_eq!(support(&logits, &Params { top_p: 0.6, ..base.clone() }), [0, 1]);
    assert_eq!(support(&logits, &Params { min_p: 0.2, ..base.clone() }), [0, 1, 2]);
    // top-p is of what top-k left: 8/12 alone reaches 0.6.
    assert_eq!(support(&logits, &Params { top_k: 2, top_p: 0.6, ..base.clone() }), [0]);
    assert_eq!(support(&logits, &Params { top_p: 1e-9, ..base }), [0]);
}

#[test]
fn top_p_of_a_flat_distribution_keeps_that_share() {
    let logits = vec![0.0; 1000];
    let found = support(&logits, &Params { top_p: 0.25, ..Params::default() });
    assert!(found.iter().all(|i| *i <= 250), "ties go to lower ids");
    assert!(found.len() > 220);
}

#[test]
fn penalties_look_at_prompt_and_output_as_they_should() {
    let mut history = History::new(&[0]);
    history.push(1);
    history.push(1);
    let greedy = Params::greedy();
    let logits = [2.0, 2.5, 1.9, -1.0];
    // Presence and frequency: the output only.
    assert_eq!(chosen(&logits, &Params { presence: 1.0, ..greedy.clone() }, &history, 0), 0);
    assert_eq!(chosen(&logits, &Params { frequency: 0.4, ..greedy.clone() }, &history, 0), 0);
    assert_eq!(chosen(&logits, &Params { frequency: 0.2, ..greedy.clone() }, &history, 0), 1);
    // Repetition: prompt and output; negative logits go further down.
    assert_eq!(chosen(&logits, &Params { repetition: 2.0, ..greedy.clone() }, &history, 0), 2);
    let below = [-1.0, -1.2, -1.5, -9.0];
    assert_eq!(chosen(&below, &Params { repetition: 2.0, ..greedy.clone() }, &history, 0), 2);
    let bias = Params { logit_bias: vec![(3, 50.0), (99, 1.0)], ..greedy };
    assert_eq!(chosen(&logits, &bias, &history, 0), 3);
}

#[test]
fn log_probabilities_are_of_the_raw_logits() {
    let mut history = History::default();
    history.push(0);
    let raw = [8f32, 4.0, 2.0, 2.0].map(f32::ln);
    let params = Params {
        temperature: 0.0,
        presence: 2.0,
        logit_bias: vec![(1, 3.0)],
        logprobs: Some(3),
        ..Params::default()
    };
    let choice = sample(&mut raw.to_vec(), &params, &history, 0, &scratch()).unwrap();
    assert_eq!(choice.token, 1);
    assert!((choice.logprob.unwrap() - 0.25f32.ln()).abs() < 1e-6);
    let ids: Vec<u32> = choice.top.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [0, 1, 2]);
    assert!((choice.top[0].1 - 0.5f32.ln()).abs() < 1e-6);

    let (logprob, top) = score(&raw, 3, 9, &scratch()).unwrap();
    assert!((logprob - 0.125f32.ln()).abs() < 1e-6);
    assert_eq!(top.len(), 4);
}

#[test]
fn logits_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = [0.0, bad, 1.0];
        let history = History::default();
        let result = sample(&mut logits, &Params::default(), &history, 0, &scratch());
        assert_eq!(result, Err(NonFinite));
    }
    assert!(score(&[f32::NAN], 0, 0, &scratch()).is_err());
}

#[test]
fn extreme_settings_still_choose() {
    let none = History::default();
    let logits = [1e30f32, -1e30, 0.0];
    assert_eq!(chosen(&logits, &Params { temperature: 2e-5, ..Params::default() }, &none, 0), 0);
    assert_eq!(chosen(&logits, &Params { temperature: 100.0, ..Params::default() }, &none, 0), 0);
    assert_eq!(
        chosen(&[0.0; 3], &Params { min_p: 1.0, top_k: 1, ..Params::default() }, &none, 5),
        0
    );
}

#[test]
fn settings_are_checked_by_name() {
    assert!(Params::default().check().is_ok() && Params::greedy().check().is_ok());
    for (params, field) in [
        (Params { temperature: -0.1, ..Params::default() }, "temperature"),
        (Params { temperature: f32::NAN, ..Params::default() }, "temperature"),
        (Params { top_p: 0.0, ..Params::default() }, "top_p"),
        (Params { top_p: 1.1, ..Params::default() }, "top_p"),
        (Params { min_p: -1.0, ..Params::default() }, "min_p"),
        (Params { presence: 3.0, ..Params::default() }, "presence_penalty"),
        (Params { frequency: f32::INFINITY, ..Params::default() }, "frequency_penalty"),
        (Params { repetition: 0.0, ..Params::default() }, "repetition_penalty"),
        (Params { logit_bias: vec![(1, 101.0)], ..Params::default() }, "logit_bias"),
    ] {
        assert_eq!(params.check().unwrap_err().field, field);
    }
}

/// A row's choice does not depend on the rows beside it, nor on the threads.
#[test]
fn rows_together_are_as_rows_alone() {
    let row = |r: usize| -> Vec<f32> {
        (0..3000).map(|i| ((i * 7919 + r * 104_729) % 2003) as f32 / 251.0).collect()
    };
    let params = |r: usize| match r % 3 {
        0 => Params::greedy(),
        1 => Params { top_p: 0.9, seed: r as u64, ..Params::default() },
        _ => Params { top_k: 40, logprobs: Some(3), repetition: 1.3, ..Params::default() },
    };
    let history = History::new(&[5, 9]);
    let alone: Vec<_> =
        (0..20).map(|r| sample(&mut row(r), &params(r), &history, r as u64, &scratch())).collect();
    for threads in [1, 3] {
        let mut logits: Vec<_> = (0..20).map(row).collect();
        let params: Vec<_> = (0..20).map(params).collect();
        let rows = logits.iter_mut().zip(&params).zip(0..).map(|((logits, params), position)| {
            Row { logits, params, history: &history, position }
        });
        let mut together: Vec<_> = alone.iter().map(|_| Err(NonFinite)).collect();
        sample_all(&Pool::new(threads), 20, rows.zip(&mut together), &scratch());
        assert_eq!(together, alone);
    }
}

/// The first of equal logits, wherever it lies; a zero's sign makes no difference.
#[test]
fn the_first_largest_is_found() {
    for (len, at) in [(1, 0), (3000, 0), (3000, 1023), (3000, 1024), (3000, 2999)] {
        let mut logits = vec![-1.0; len];
        logits[at..].fill(0.0);
        logits[at] = -0.0;
        let choice = sample(&mut logits, &Params::greedy(), &History::default(), 0, &scratch());
        assert_eq!(choice.unwrap().token, at as u32);
    }
}

#[test]
fn a_draw_is_all_that_plain_requests_ask_for() {
    let plain = Params { temperature: 0.7, min_p: 0.1, seed: 5, ..Params::default() };
    let draw = Draw { seed: 5, position: 9, temperature: 0.7, min_p: 0.1 };
    assert_eq!(plain.draw(9), Some(draw));
    // The most probable token is among the most probable ones.
    assert!(Params { top_k: 3, top_p: 0.5, ..Params::greedy() }.draw(0).is_some());
    for more in [
        Params { top_k: 3, ..plain.clone() },
        Params { top_p: 0.9, ..plain.clone() },
        Params { logprobs: Some(0), ..plain.clone() },
        Params { logit_bias: vec![(1, 1.0)], ..plain.clone() },
        Params { presence: 0.1, ..Params::greedy() },
        Params { frequency: 0.1, ..Params::greedy() },
        Params { repetition: 1.1, ..Params::greedy() },
    ] {
        assert_eq!(more.draw(9), None, "{more:?}");
    }
}
