//! `bw_size=…,bw_one_time_burst=…,bw_refill_time=…,ops_size=…,ops_one_time_burst=…,ops_refill_time=…`

use std::time::Duration;

use devices::virtio::rate_limiter::{Bucket, Limits};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// How much a device may do; what is not said is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Operations: for a network, frames.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

impl RateLimiterConfig {
    /// From the values of the options for bytes and for operations, each size, burst and time to refill; nothing where none is
    /// given.
    pub(super) fn from_options(
        bandwidth: [Option<&str>; 3],
        ops: [Option<&str>; 3],
    ) -> Result<Option<Self>, ConfigError> {
        let bandwidth = TokenBucket::from_options(
            ["bw_size", "bw_one_time_burst", "bw_refill_time"],
            bandwidth,
        )?;
        let ops =
            TokenBucket::from_options(["ops_size", "ops_one_time_burst", "ops_refill_time"], ops)?;
        let any = bandwidth.is_some() || ops.is_some();
        Ok(any.then_some(Self { bandwidth, ops }))
    }
}

/// So much at once, and so fast again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How much there is when it is full.
    pub size: u64,
    /// How much more there is once, at the start.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// How long it takes to be full again, in milliseconds.
    pub refill_time: u64,
}

impl TokenBucket {
    /// From what the options with `names` (size, burst, time to refill) say.
    fn from_options(
        names: [&'static str; 3],
        values: [Option<&str>; 3],
    ) -> Result<Option<Self>, ConfigError> {
        let number = |at: usize| {
            values[at]
                .map(|value| {
                    value.parse::<u64>().map_err(|_| ConfigError::NotANumber {
                        key: names[at],
                        value: value.to_owned(),
                    })
                })
                .transpose()
        };
        match (number(0)?, number(1)?, number(2)?) {
            (None, None, None) => Ok(None),
            (Some(size), one_time_burst, Some(refill_time)) => Ok(Some(Self {
                size,
                one_time_burst,
                refill_time,
            })),
            (None, _, _) => Err(ConfigError::Missing(names[0])),
            (_, _, None) => Err(ConfigError::Missing(names[2])),
        }
    }
}

impl From<&RateLimiterConfig> for Limits {
    fn from(config: &RateLimiterConfig) -> Self {
        let bucket = |bucket: &TokenBucket| Bucket {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or(0),
            refill_time: Duration::from_millis(bucket.refill_time),
        };
        Self {
            operations: config.ops.as_ref().map(bucket),
            bytes: config.bandwidth.as_ref().map(bucket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_needs_a_size_and_a_time() {
        let names = ["bw_size", "bw_one_time_burst", "bw_refill_time"];
        let parse = |values| TokenBucket::from_options(names, values);
        assert_eq!(parse([None; 3]), Ok(None));
        let bucket = TokenBucket {
            size: 1000,
            one_time_burst: None,
            refill_time: 100,
        };
        assert_eq!(parse([Some("1000"), None, Some("100")]), Ok(Some(bucket)));
        assert_eq!(
            parse([Some("1000"), Some("5"), None]),
            Err(ConfigError::Missing("bw_refill_time"))
        );
        assert_eq!(
            parse([None, Some("5"), Some("100")]),
            Err(ConfigError::Missing("bw_size"))
        );
        assert!(parse([Some("1k"), None, Some("100")]).is_err());
    }
}
