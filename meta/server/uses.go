package server

import (
	"math/bits"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// uses is when each chunk of a volume was used last, as far as this leader has
// heard: what it has not heard of was used when it began to lead. So a new leader
// takes everything for used, and nothing is cooled before its time.
type uses struct {
	at   time.Duration // the last report
	all  time.Duration // any chunk may have been used then; 0: when the tenure began
	last []uint32      // by index, in seconds of this machine's clock, rounded up; 0: not yet
}

const (
	useFresh = 3 * 10 * time.Second // a report of an attached volume is due every ten
	useSweep = time.Hour            // removed volumes are forgotten so often
	useBytes = 64 << 10             // of one report's bits; a longer one says nothing
)

// usesOf returns a volume's uses, empty at first; t.mu is held.
func (t *tenure) usesOf(volume uint64) *uses {
	u := t.uses[volume]
	if u == nil {
		u = &uses{}
		if t.uses == nil {
			t.uses = map[uint64]*uses{}
		}
		t.uses[volume] = u
	}
	return u
}

// hear keeps a gateway's report.
func (u *uses) hear(r *pb.VolumeHeat, now time.Duration) {
	u.at = now
	if !r.Said || len(r.Used) > useBytes {
		u.all, u.last = now, nil
		return
	}
	for i, b := range r.Used {
		for ; b != 0; b &= b - 1 {
			u.use(uint32(8*i+bits.TrailingZeros8(b)), now)
		}
	}
}

func (u *uses) use(index uint32, now time.Duration) {
	if n := int(index) + 1 - len(u.last); n > 0 {
		u.last = append(u.last, make([]uint32, n)...)
	}
	u.last[index] = uint32(now/time.Second) + 1
}

// use notes that new chunks of a volume are about to be written.
func (t *tenure) use(volume uint64, indices []uint32, now time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.usesOf(volume)
	for _, i := range indices {
		if i < 8*useBytes { // what no report could name is of the tenure's begin
			u.use(i, now)
		}
	}
}

// warmth fills in the heat of a volume's chunks, and for how long each was idle.
// What nobody has attached has no heat, whatever it was.
func (t *tenure) warmth(v *VolumeView, now time.Duration) {
	if v.Home != "" {
		heat := t.heatOf(v.ID, now)
		for i := range v.Chunks {
			c := &v.Chunks[i]
			c.Read, c.Write = float64(heat[c.Index].GetRead()), float64(heat[c.Index].GetWrite())
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	u := t.usesOf(v.ID)
	known := v.Home == "" || u.at > 0 && now <= u.at+useFresh
	for i := range v.Chunks {
		c := &v.Chunks[i]
		if c.IdleMs = -1; known {
			since := max(t.since, u.all)
			if int(c.Index) < len(u.last) {
				since = max(since, time.Duration(u.last[c.Index])*time.Second)
			}
			c.IdleMs = max(now-since, 0).Milliseconds()
		}
	}
}

// sweepUses forgets volumes that are gone.
func (t *tenure) sweepUses(kv state.KV, now time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now < t.usesSwept+useSweep {
		return
	}
	t.usesSwept = now
	for id := range t.uses {
		if state.VolumeByID(kv, id) == nil {
			delete(t.uses, id)
		}
	}
}
