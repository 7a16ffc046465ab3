//! Detection in a process with a device: it finds out who schedules, and leaves nothing behind. Needs softmshv beside the tests'
//! folder, and runs itself again under it.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use scheduler::{BUDGET, Says, Verdict};

const INSIDE: &str = "ROTA_DETECTION_INSIDE";

/// Runs the named test again under softmshv with these options; whether this is that run.
fn inside(name: &str, options: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let me = std::env::current_exe().expect("this program");
    let folder = me.parent().and_then(Path::parent).expect("target folder");
    let softmshv = folder.join("softmshv");
    let needed = [
        softmshv.clone(),
        folder.join("libsoftmshv.so"),
        "/dev/kvm".into(),
    ];
    if let Some(missing) = needed.iter().find(|path| !path.exists()) {
        rota_tests::requires::print_skip(name, &format!("there is no {}", missing.display()));
        return false;
    }
    let output = Command::new(softmshv)
        .args(options)
        .arg("--")
        .arg(me)
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, "1")
        .output()
        .expect("softmshv");
    assert!(output.status.success(), "{output:?}");
    false
}

/// Descriptors, threads, and what is done about signals.
type Belongings = (BTreeSet<String>, usize, Vec<String>);

/// What a process has that somebody could have forgotten to give back.
fn belongings() -> Belongings {
    let entries = |folder| fs::read_dir(folder).expect("proc").filter_map(Result::ok);
    let descriptors = entries("/proc/self/fd")
        .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()))
        .collect();
    let status = fs::read_to_string("/proc/thread-self/status").expect("proc");
    let signals = status
        .lines()
        .filter(|line| line.starts_with("Sig") && !line.starts_with("SigQ"))
        .map(str::to_owned)
        .collect();
    (descriptors, entries("/proc/self/task").count(), signals)
}

fn leaves_nothing(expected: Verdict, says: Says) {
    let device = File::open("/dev/mshv").expect("the device");
    let look = || {
        let found = scheduler::examine(Ok(device.as_fd()), 4 * BUDGET);
        assert_eq!((found.verdict, found.consistent), (expected, true));
        let behaviour = found
            .evidence
            .iter()
            .filter(|evidence| evidence.source.starts_with("behaviour"))
            .map(|evidence| evidence.says);
        assert_eq!(behaviour.collect::<Vec<_>>(), [says; 2], "{found}");
    };
    // The first time softmshv itself takes a signal.
    look();
    let deadline = Instant::now() + Duration::from_secs(5);
    let before = belongings();
    look();
    // A thread that was told to end, and nobody waits for, takes a moment: one of the first time, too, so that there may be fewer now.
    let is_more =
        |now: &Belongings| !now.0.is_subset(&before.0) || now.1 > before.1 || now.2 != before.2;
    let mut now = belongings();
    while is_more(&now) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
        now = belongings();
    }
    assert!(!is_more(&now), "{now:?} instead of {before:?}");
}

#[test]
fn nothing_is_left_behind_where_linux_schedules() {
    if inside("nothing_is_left_behind_where_linux_schedules", &[]) {
        leaves_nothing(Verdict::Integrated, Says::Linux);
    }
}

#[test]
fn nothing_is_left_behind_where_the_hypervisor_schedules() {
    let core = ["--scheduler", "core"];
    if inside(
        "nothing_is_left_behind_where_the_hypervisor_schedules",
        &core,
    ) {
        leaves_nothing(Verdict::Core, Says::Hypervisor);
    }
}

#[test]
fn detections_at_the_same_time_do_not_disturb_each_other() {
    if !inside("detections_at_the_same_time_do_not_disturb_each_other", &[]) {
        return;
    }
    let device = File::open("/dev/mshv").expect("the device");
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                // Each waits for its turn, so that more than one budget goes by.
                let found = scheduler::examine(Ok(device.as_fd()), 4 * BUDGET);
                assert_eq!(found.verdict, Verdict::Integrated, "{found}");
            });
        }
    });
}

#[test]
fn a_budget_of_nothing_runs_nothing() {
    if !inside("a_budget_of_nothing_runs_nothing", &[]) {
        return;
    }
    let device = File::open("/dev/mshv").expect("the device");
    let found = scheduler::detect(&device);
    assert_eq!(found.verdict, Verdict::Integrated);
    assert_eq!((found.hypercalls, found.residual_steal_ppm), (2, None));
    assert!(
        !found
            .evidence
            .iter()
            .any(|evidence| evidence.source.starts_with("behaviour"))
    );
}
