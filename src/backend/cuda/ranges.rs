//! A set of numbers as disjoint ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that neither overlap nor are empty: end by start.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<usize, usize>);

impl Ranges {
    /// One range.
    pub(super) fn of(range: Range<usize>) -> Self {
        Self((!range.is_empty()).then_some((range.start, range.end)).into_iter().collect())
    }

    /// Whether all of a range is in the set.
    pub(super) fn contains(&self, range: &Range<usize>) -> bool {
        range.is_empty() || self.0.range(..=range.start).next_back().is_some_and(|(_, &end)| range.end <= end)
    }

    /// Takes a range out of the set, and returns those parts of it that were there, ascending.
    pub(super) fn take(&mut self, range: &Range<usize>) -> Vec<Range<usize>> {
        if range.is_empty() {
            return Vec::new();
        }
        let first = self.0.range(..=range.start).next_back().map_or(range.start, |(&start, _)| start);
        let touched: Vec<(usize, usize)> = self.0.range(first..range.end).map(|(&start, &end)| (start, end)).collect();
        let mut taken = Vec::new();
        for (start, end) in touched.into_iter().filter(|&(_, end)| end > range.start) {
            self.0.remove(&start);
            if start < range.start {
                self.0.insert(start, range.start);
            }
            if end > range.end {
                self.0.insert(range.end, end);
            }
            taken.push(start.max(range.start)..end.min(range.end));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_is_gone() {
        let mut set = Ranges::of(0..100);
        assert!(set.contains(&(0..100)) && set.contains(&(7..7)) && !set.contains(&(50..101)));
        assert_eq!(set.take(&(10..20)), vec![10..20]);
        assert_eq!(set.take(&(15..30)), vec![20..30]);
        assert!(set.take(&(10..30)).is_empty() && set.take(&(5..5)).is_empty() && set.take(&(100..200)).is_empty());
        assert!(
            set.contains(&(0..10)) && set.contains(&(30..100)) && !set.contains(&(9..11)) && !set.contains(&(12..13))
        );
        assert_eq!(set.take(&(40..50)), vec![40..50]);
        assert_eq!(set.take(&(0..1000)), vec![0..10, 30..40, 50..100]);
        assert_eq!(set, Ranges::default());
        assert_eq!(Ranges::of(3..3), Ranges::default());
    }
}
