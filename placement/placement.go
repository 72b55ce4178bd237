// Package placement decides where new chunks and virtual machines go.
//
// Duty: pure policies over a snapshot of the cluster: filter, score, choose,
// and say why with every candidate's scores. The same request with the same
// seed gives the same answer. Floor: F2. It reads no clock and no cluster
// state and changes no cluster: a Fleet is a picture that decisions are bound
// to, the metadata state machine checks and commits a choice, and Rebalance
// and Price plan moves that others carry out.
//
//	chunks   stores for new chunks
//	fleet    hosts and what is bound to them; filters
//	levels   hosts by how full they are
//	decide   score plugins, sampled and full decisions
//	queue    which VM goes next; preemption; time slices
//	tiers    cold chunks to slow stores, warm ones back
//	heat     what part of a VM's traffic a host would serve itself
//	meter    the counters behind heat, on a gateway's data path
//	price    what staying, moving the VM or moving the data costs
package placement

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"strings"
)

// listMax bounds how many candidates one sentence names; an explanation's
// table has them all.
const listMax = 6

// draw returns a number in (0, 1) that depends on the seed and the key alone.
func draw(seed uint64, key []byte) float64 {
	h := fnv.New64a()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], seed)
	_, _ = h.Write(b[:]) // a hash.Hash never returns an error
	_, _ = h.Write(key)
	// FNV leaves the upper bits of short keys poorly mixed: finish with the
	// finalizer of splitmix64 (Steele, Lea, Flood 2014).
	x := h.Sum64()
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	return (float64(x>>11) + 0.5) / (1 << 53)
}

// Bytes writes a size for a person: "64.0 MiB".
func Bytes(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1023.95 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// free is capacity − used, never below 0: a heartbeat may say more is used
// than was promised.
func free(capacity, used uint64) uint64 { return capacity - min(capacity, used) }

// list joins at most listMax items and counts the rest.
func list(items []string) string {
	if len(items) <= listMax {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:listMax], ", "), len(items)-listMax)
}

// plural returns "1 host", "2 hosts".
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
