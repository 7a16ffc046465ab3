//! `--rate-limit-group id=NAME,bw_size=…,ops_size=…`

use std::{collections::HashSet, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{ConfigError, VmConfig, options::keys, rate_limiter::RateLimiterConfig};

/// Limits that disks have in common: what one takes, the others have not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitGroupConfig {
    /// By which name disks belong to it.
    pub id: String,
    /// What they may do together.
    pub rate_limiter_config: RateLimiterConfig,
}

impl FromStr for RateLimitGroupConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let names = [
            "id",
            "bw_size",
            "bw_one_time_burst",
            "bw_refill_time",
            "ops_size",
            "ops_one_time_burst",
            "ops_refill_time",
        ];
        let known = "id, bw_size, bw_one_time_burst, bw_refill_time, ops_size, ops_one_time_burst, ops_refill_time";
        let [
            id,
            bw_size,
            bw_burst,
            bw_time,
            ops_size,
            ops_burst,
            ops_time,
        ] = keys(text, names, known)?;
        let limits = RateLimiterConfig::from_options(
            [bw_size, bw_burst, bw_time],
            [ops_size, ops_burst, ops_time],
        )?;
        Ok(Self {
            id: id.ok_or(ConfigError::Missing("id"))?.to_owned(),
            rate_limiter_config: limits.ok_or(ConfigError::NoLimit)?,
        })
    }
}

/// Checks that groups can be told apart, and that those which disks belong to are there.
pub(super) fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    let mut groups = HashSet::new();
    for group in &config.rate_limit_groups {
        if group.id.is_empty() || !groups.insert(group.id.as_str()) {
            return Err(ConfigError::SameGroup(group.id.clone()));
        }
    }
    for disk in &config.disks {
        if let Some(group) = &disk.rate_limit_group
            && !groups.contains(group.as_str())
        {
            return Err(ConfigError::NoGroup(group.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{TokenBucket, tests::config};

    fn group(text: &str) -> RateLimitGroupConfig {
        text.parse().unwrap()
    }

    #[test]
    fn options() {
        let bucket = TokenBucket {
            size: 10,
            one_time_burst: None,
            refill_time: 100,
        };
        let wanted = RateLimitGroupConfig {
            id: "slow".into(),
            rate_limiter_config: RateLimiterConfig {
                bandwidth: None,
                ops: Some(bucket),
            },
        };
        assert_eq!(group("id=slow,ops_size=10,ops_refill_time=100"), wanted);
        let error = |text: &str| {
            text.parse::<RateLimitGroupConfig>()
                .unwrap_err()
                .to_string()
        };
        assert_eq!(error("ops_size=1,ops_refill_time=1"), "'id' is missing");
        assert!(error("id=slow").contains("limits nothing"));
    }

    #[test]
    fn disks_belong_to_groups_that_are_there() {
        let mut config = config();
        config
            .disks
            .push("path=a,rate_limit_group=slow".parse().unwrap());
        let missing = Err(ConfigError::NoGroup("slow".into()));
        assert_eq!(validate(&config), missing);
        config
            .rate_limit_groups
            .push(group("id=slow,ops_size=10,ops_refill_time=100"));
        assert_eq!(validate(&config), Ok(()));
        let again = config.rate_limit_groups[0].clone();
        config.rate_limit_groups.push(again);
        let twice = Err(ConfigError::SameGroup("slow".into()));
        assert_eq!(validate(&config), twice);
    }
}
