//! Counts and times of an answer, in KTransformers' form.

use ktx_core::Statistics;

/// Six lines, without the end of the last. Rates and durations of the prompt include the first token
/// that was generated; those of the generation do not, its count does.
pub(crate) fn report(statistics: &Statistics) -> String {
    format!(
        "prompt eval count:    {} token(s)\n\
         prompt eval duration: {:.6}s\n\
         prompt eval rate:     {:.2} tokens/s\n\
         eval count:           {} token(s)\n\
         eval duration:        {:.6}s\n\
         eval rate:            {:.2} tokens/s",
        statistics.prompt_tokens,
        statistics.prompt_time.as_secs_f64(),
        statistics.prompt_rate(),
        statistics.generated_tokens,
        statistics.generate_time.as_secs_f64(),
        statistics.generate_rate(),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_are_those_of_the_original() {
        let statistics = Statistics {
            prompt_tokens: 10,
            cached_tokens: 3,
            prompt_time: Duration::from_millis(500),
            generated_tokens: 5,
            generate_time: Duration::from_secs(2),
        };
        assert_eq!(
            report(&statistics),
            "prompt eval count:    10 token(s)\nprompt eval duration: 0.500000s\n\
             prompt eval rate:     20.00 tokens/s\neval count:           5 token(s)\n\
             eval duration:        2.000000s\neval rate:            2.00 tokens/s"
        );
    }
}
