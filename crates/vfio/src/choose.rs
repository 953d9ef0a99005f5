//! Which of the free GPUs an instance gets that asks for a number of them. Pure and deterministic; called by the
//! inventory under its lock, so it has a bound.

use std::collections::BTreeSet;

use qudata_host::pci::PciAddress;

use crate::{distance::distance, topology::Topology};

/// So many sets are compared; with more, one is grown from each GPU. All sets of 16 GPUs are fewer.
const MOST_SETS: u64 = 20_000;

/// The best `count` of the GPUs in `free`: on as few NUMA nodes as possible, then as near to each other as possible
/// (the smallest sum of distances), then with the lowest addresses. In the order of addresses. None when too few are
/// free; what `topology` does not know is not free.
#[must_use]
pub fn choose(topology: &Topology, free: &[PciAddress], count: usize) -> Option<Vec<PciAddress>> {
    let known: BTreeSet<PciAddress> =
        free.iter().copied().filter(|address| topology.devices.contains_key(address)).collect();
    let field = Field::new(topology, known.into_iter().collect());
    let best =
        if sets(field.gpus.len(), count) <= MOST_SETS { field.best(count) } else { field.grown(count) };
    Some(best?.into_iter().filter_map(|index| field.gpus.get(index).copied()).collect())
}

/// How many sets of `count` out of `all` there are.
fn sets(all: usize, count: usize) -> u64 {
    let fewer = count.min(all.saturating_sub(count));
    (0..fewer).fold(1_u64, |sets, i| {
        let (left, taken) =
            (u64::try_from(all - i).unwrap_or(u64::MAX), u64::try_from(i + 1).unwrap_or(u64::MAX));
        sets.saturating_mul(left) / taken
    })
}

/// The free GPUs with all their distances, by index.
struct Field {
    gpus: Vec<PciAddress>,
    nodes: Vec<Option<u32>>,
    costs: Vec<Vec<u32>>,
}

/// What makes a set worse, in the order of importance; ties go to the lower indexes.
type Penalty = (usize, u32);

impl Field {
    fn new(topology: &Topology, gpus: Vec<PciAddress>) -> Self {
        let node = |gpu| topology.devices.get(gpu).and_then(|device| device.numa_node);
        let costs = |a: &PciAddress| gpus.iter().map(|b| distance(topology, *a, *b).cost()).collect();
        Self { nodes: gpus.iter().map(node).collect(), costs: gpus.iter().map(costs).collect(), gpus }
    }

    fn cost(&self, a: usize, b: usize) -> u32 {
        self.costs.get(a).and_then(|row| row.get(b)).copied().unwrap_or(u32::MAX)
    }

    fn penalty(&self, set: &[usize]) -> Penalty {
        let nodes: BTreeSet<_> = set.iter().map(|index| self.nodes.get(*index)).collect();
        let pairs = set.iter().enumerate().flat_map(|(i, a)| set.iter().skip(i + 1).map(move |b| (*a, *b)));
        (nodes.len(), pairs.fold(0, |sum: u32, (a, b)| sum.saturating_add(self.cost(a, b))))
    }

    /// The best of all sets. They come in the order of their indexes, so of equals the first is the lowest.
    fn best(&self, count: usize) -> Option<Vec<usize>> {
        let mut set: Vec<usize> = (0..count).collect();
        if count > self.gpus.len() {
            return None;
        }
        let mut best = (self.penalty(&set), set.clone());
        while advance(&mut set, self.gpus.len()) {
            let penalty = self.penalty(&set);
            if penalty < best.0 {
                best = (penalty, set.clone());
            }
        }
        Some(best.1)
    }

    /// A good set: the best of those that are grown from each GPU by always adding what worsens it least.
    fn grown(&self, count: usize) -> Option<Vec<usize>> {
        let grow = |seed: usize| {
            let mut set = vec![seed];
            while set.len() < count {
                let candidates = (0..self.gpus.len()).filter(|index| !set.contains(index));
                let with = |index: &usize| self.penalty(&[set.as_slice(), &[*index]].concat());
                set.push(candidates.min_by_key(with)?);
            }
            set.sort_unstable();
            Some(set)
        };
        (0..self.gpus.len()).filter_map(grow).min_by_key(|set| (self.penalty(set), set.clone()))
    }
}

/// Turns a set of indexes below `all`, in order, into the next one; false after the last.
fn advance(set: &mut [usize], all: usize) -> bool {
    let mut limit = all;
    for place in (0..set.len()).rev() {
        limit -= 1;
        let Some(index) = set.get_mut(place).filter(|index| **index < limit) else { continue };
        *index += 1;
        let mut next = *index;
        for later in set.iter_mut().skip(place + 1) {
            next += 1;
            *later = next;
        }
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::topology::{Isolation, PciDevice};

    /// A machine of GPUs as `(node, root bus, switch)`; the address follows from the place in the list.
    fn machine(gpus: &[(u32, u8, u8)]) -> (Topology, Vec<PciAddress>) {
        let mut devices = BTreeMap::new();
        for (i, (node, root, switch)) in gpus.iter().enumerate() {
            let at = |text: String| text.parse::<PciAddress>().unwrap();
            let address = at(format!("0000:{:02x}:00.0", 0x20 + i));
            let upstream = vec![
                at(format!("0000:{root:02x}:01.0")),
                at(format!("000{switch}:{root:02x}:00.0")),
                at(format!("0001:{:02x}:00.0", 0x20 + i)),
            ];
            let device = PciDevice {
                address,
                class: 0x03_0200,
                vendor: 0x10de,
                device: 0x20b5,
                driver: None,
                group: None,
                numa_node: Some(*node),
                link: None,
                bars: Vec::new(),
                reset_methods: Vec::new(),
                upstream,
                boot_vga: false,
                physical: None,
            };
            devices.insert(address, device);
        }
        let all = devices.keys().copied().collect();
        (Topology { devices, isolation: Isolation::default() }, all)
    }

    fn chosen(topology: &Topology, free: &[PciAddress], count: usize) -> Vec<usize> {
        let set = choose(topology, free, count).unwrap();
        set.iter().map(|gpu| topology.devices.keys().position(|at| at == gpu).unwrap()).collect()
    }

    #[test]
    fn one_node_before_one_switch_before_low_addresses() {
        let gpus = [(0, 1, 1), (0, 1, 2), (1, 9, 1), (1, 9, 1), (0, 1, 2)];
        let (topology, all) = machine(&gpus);
        assert_eq!(chosen(&topology, &all, 1), [0]);
        assert_eq!(
            chosen(&topology, &all, 2),
            [1, 4],
            "the switch of 1 and 4, and lower than that of 2 and 3"
        );
        assert_eq!(chosen(&topology, &all, 3), [0, 1, 4], "all of one node");
        assert_eq!(chosen(&topology, &all[..4], 3), [0, 2, 3], "two nodes, but a pair under one switch");
        assert_eq!(chosen(&topology, &all, 5), [0, 1, 2, 3, 4]);
    }

    /// Two pairs under a switch each are nearer in sum than four cards on four host bridges, but on two nodes.
    #[test]
    fn one_node_even_where_the_sum_is_larger() {
        let pairs = [(0, 1, 1), (0, 1, 1), (1, 2, 1), (1, 2, 1)];
        let spread = [(2, 3, 1), (2, 4, 1), (2, 5, 1), (2, 6, 1)];
        let (topology, all) = machine(&[pairs, spread].concat());
        let field = Field::new(&topology, all.clone());
        assert!(field.penalty(&[0, 1, 2, 3]).1 < field.penalty(&[4, 5, 6, 7]).1);
        assert_eq!(chosen(&topology, &all, 4), [4, 5, 6, 7]);
    }

    #[test]
    fn too_many_too_few_and_strangers() {
        let (topology, all) = machine(&[(0, 1, 1), (0, 1, 1)]);
        assert_eq!(choose(&topology, &all, 0), Some(Vec::new()));
        assert_eq!(choose(&topology, &all, 3), None);
        assert_eq!(choose(&topology, &[], 1), None);
        let stranger = "0000:99:00.0".parse().unwrap();
        assert_eq!(
            choose(&topology, &[stranger, all[1], all[1]], 2),
            None,
            "neither a stranger nor one twice"
        );
        assert_eq!(choose(&topology, &[stranger, all[1], all[1]], 1), Some(vec![all[1]]));
    }

    #[test]
    fn many_gpus_are_grown_and_still_share_a_node() {
        let gpus: Vec<_> = (0..32).map(|i| (i % 2, 1 + u8::try_from(i % 2).unwrap(), 1)).collect();
        let (topology, all) = machine(&gpus);
        assert!(sets(32, 16) > MOST_SETS);
        assert_eq!(chosen(&topology, &all, 16), (0..16).map(|i| 2 * i).collect::<Vec<_>>());
    }

    #[test]
    fn counting_sets() {
        for (all, count, expected) in
            [(8, 3, 56), (16, 8, 12_870), (4, 0, 1), (4, 4, 1), (3, 7, 1), (0, 0, 1)]
        {
            assert_eq!(sets(all, count), expected, "{count} of {all}");
        }
        assert!(sets(1000, 500) > MOST_SETS);
    }

    fn machines() -> impl Strategy<Value = Vec<(u32, u8, u8)>> {
        proptest::collection::vec((0_u32..2, 1_u8..3, 1_u8..3), 0..8)
    }

    proptest! {
        /// Against the definition: every subset, by bit mask.
        #[test]
        fn no_set_is_better(gpus in machines(), count in 0_usize..8) {
            let (topology, all) = machine(&gpus);
            let field = Field::new(&topology, all.clone());
            let best = (0_u32..1 << all.len())
                .filter(|mask| mask.count_ones() as usize == count)
                .map(|mask| (0..all.len()).filter(|i| mask & (1 << i) != 0).collect::<Vec<_>>())
                .min_by_key(|set| (field.penalty(set), set.clone()));
            let expected = best.map(|set| set.into_iter().map(|i| all[i]).collect::<Vec<_>>());
            prop_assert_eq!(choose(&topology, &all, count), expected);
        }

        /// The order in which the free ones are told does not matter; what comes back is free, sorted and enough.
        #[test]
        fn the_order_of_the_free_does_not_matter(gpus in machines(), count in 0_usize..8) {
            let (topology, all) = machine(&gpus);
            let mut turned = all.clone();
            turned.reverse();
            let set = choose(&topology, &all, count);
            prop_assert_eq!(&choose(&topology, &turned, count), &set);
            if let Some(set) = set {
                prop_assert!(set.len() == count && set.is_sorted() && set.iter().all(|gpu| all.contains(gpu)));
            }
        }

        /// Growing finds as few nodes as comparing does.
        #[test]
        fn a_grown_set_is_on_as_few_nodes(gpus in machines(), count in 1_usize..8) {
            let (topology, all) = machine(&gpus);
            let field = Field::new(&topology, all);
            let nodes = |set: Option<Vec<usize>>| set.map(|set| field.penalty(&set).0);
            prop_assert_eq!(nodes(field.grown(count)), nodes(field.best(count)));
        }
    }
}
