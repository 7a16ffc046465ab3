//! What holds for every plan: a short run here, the long one is `cargo run --release -p scheduler --example plan`.

#[path = "../examples/plan/scenario.rs"]
mod scenario;

use scenario::{Tally, run};

#[test]
fn hundreds_of_hosts_and_no_violation() {
    let mut tally = Tally::default();
    for seed in 0..400 {
        run(seed, &mut tally);
    }
    assert!(
        tally.violations.is_empty(),
        "{} violations, first: {:#?}",
        tally.violations.len(),
        &tally.violations[..tally.violations.len().min(5)]
    );
    assert!(tally.plans > 400 && tally.refusals > 400, "{tally:?}");
}
