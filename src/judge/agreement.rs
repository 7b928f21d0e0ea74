//! How far two judges agree.

/// Cohen's κ of two judges' yes and no on the same items: (p_o - p_e) / (1 - p_e), where p_o is the share of items on which they
/// agree, and p_e the share on which they would agree if each said yes as often as it does, but independently of the other
/// (J. Cohen, 1960). `None` without items, and where both always say the same one thing: then p_e is 1.
pub fn cohen_kappa(pairs: impl IntoIterator<Item = (bool, bool)>) -> Option<f64> {
    let (mut n, mut agree, mut yes) = (0usize, 0usize, [0usize; 2]);
    for (a, b) in pairs {
        n += 1;
        agree += usize::from(a == b);
        yes[0] += usize::from(a);
        yes[1] += usize::from(b);
    }
    let of = |count: usize| count as f64 / n as f64;
    let by_chance = of(yes[0]) * of(yes[1]) + of(n - yes[0]) * of(n - yes[1]);
    (n > 0 && by_chance < 1.0).then(|| (of(agree) - by_chance) / (1.0 - by_chance))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kappa(table: [usize; 4]) -> Option<f64> {
        let [both, first, second, neither] = table;
        let of = |n, pair| std::iter::repeat_n(pair, n);
        let pairs = of(both, (true, true)).chain(of(first, (true, false)));
        cohen_kappa(pairs.chain(of(second, (false, true))).chain(of(neither, (false, false))))
    }

    #[test]
    fn kappa_of_known_tables() {
        // By hand: p_o 0.7, p_e 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
        assert!((kappa([20, 5, 10, 15]).unwrap() - 0.4).abs() < 1e-12);
        // p_o 0.6 in both, by different margins: 0.1304 and 0.2593.
        assert!((kappa([45, 15, 25, 15]).unwrap() - 0.1304).abs() < 5e-5);
        assert!((kappa([25, 35, 5, 35]).unwrap() - 0.2593).abs() < 5e-5);
        assert_eq!(kappa([3, 0, 0, 4]), Some(1.0));
        assert_eq!(kappa([0, 2, 2, 0]), Some(-1.0));
        assert_eq!(kappa([5, 0, 0, 0]), None, "both always say yes");
        assert_eq!(kappa([5, 5, 0, 0]), Some(0.0), "one of them always says yes");
        assert_eq!(kappa([0; 4]), None);
    }
}
