package placement

import (
	"math"
	"time"
)

// Heat is how much a chunk is read and written: bytes, halved every HalfLife.
type Heat struct{ Read, Write float64 }

// HalfLife is how fast heat is forgotten: an hour-old burst must not move a VM,
// a night's pause must not cool a database down.
const HalfLife = 10 * time.Minute

// Decay returns the heat after a time without traffic.
func (h Heat) Decay(d time.Duration) Heat {
	f := math.Exp2(-float64(d) / float64(HalfLife))
	return Heat{h.Read * f, h.Write * f}
}

// ChunkHeat is a chunk of a VM: its heat and the hosts with an in-sync replica.
type ChunkHeat struct {
	Heat
	Hosts []int
	Bytes uint64
}

// Gain returns, for every host with any of a VM's chunks, what part of the VM's
// traffic it would serve without the network:
//
//	Σ over chunks of (read × local + write × local ÷ R) ÷ Σ of (read + write ÷ R)
//
// Every write goes to all R replicas wherever the VM is; being local saves one
// of R transfers. Chunks without any heat count by their size, at a millionth:
// a VM that was never started still goes where its data is.
func Gain(chunks []ChunkHeat) map[int]float64 {
	var total float64
	out := map[int]float64{}
	for _, c := range chunks {
		r := float64(max(len(c.Hosts), 1))
		v := c.Read + c.Write/r + float64(c.Bytes)/1e6
		total += v
		for _, h := range c.Hosts {
			out[h] += v
		}
	}
	for h := range out {
		if total > 0 {
			out[h] /= total
		}
	}
	return out
}
