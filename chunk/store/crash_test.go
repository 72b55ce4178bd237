package store

import (
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// cutRun plays random requests until the disk stops answering and returns the
// models since the last answered flush, the last one being that of the request
// without an answer.
func (p *player) cutRun(n int) []model {
	since := []model{p.m.clone()}
	for range n {
		q, after := p.next()
		epoch := p.epoch
		r := ask(p.s, q)
		if r.Status != 0 {
			p.epoch = epoch
			return append(since, after)
		}
		p.m = after
		since = append(since, after)
		switch q.Kind {
		case wire.Flush, wire.Seal:
			since = []model{after}
		}
		if p.rng.IntN(4) == 0 {
			p.now += 600e6
			p.s.Step(p.now)
		}
	}
	return since
}

// recovered reads the whole store and holds each block against the models.
func (p *player) recovered(models []model, what string) model {
	m := model{}
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b += 8 {
			r := mustOK(p.t, ask(p.s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Epoch: 1000, Chunk: c, Block: b, Count: 8}))
			for i := range ids.Block(8) {
				k, why := blockID{c, b + i}, ""
				found := false
				for _, cand := range models {
					if why = compare(cand[k], r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why == "" {
						m.set(k, cand[k])
						found = true
						break
					}
				}
				if !found {
					p.t.Fatalf("seed %d, %s: chunk %d block %d is none of the %d states it may have: %s", p.seed, what, c, k.b, len(models), why)
				}
			}
		}
	}
	return m
}

// reopen opens what a crash left.
func (p *player) reopen(d *disk.Mem, boot, what string) {
	s, err := Open(Config{Disk: d, BootID: boot})
	if err != nil {
		p.t.Fatalf("seed %d, %s: %v", p.seed, what, err)
	}
	if n := s.Usage().Note; n != "" {
		p.t.Fatalf("seed %d, %s: recovery takes a crash for damage: %s", p.seed, what, n)
	}
	p.s = s
}

// The power goes, or the process is killed, before every single disk
// operation: what was flushed is there, nothing is torn or invented, a kill
// loses nothing answered, what was read once stays, and the store goes on.
func TestCrashAtEveryDiskOperation(t *testing.T) {
	seeds := uint64(6)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		ops := 0
		for cut := 1; ; cut++ {
			if seed >= 2 {
				cut += 3 // later seeds go in steps
			}
			d := formatMem(t)
			s := open(t, d, testBoot)
			p := newPlayer(t, seed, s)
			base := d.Ops()
			d.CutAt(base + cut)
			models := p.cutRun(120)
			if d.Ops() < base+cut {
				ops = cut
				break
			}
			state := *p
			for _, keep := range []int{0, 50, 100} {
				q := state
				q.crashed(d, models, seed*1000+uint64(cut), keep, "boot-2")
			}
			q := state
			q.crashed(d, models[max(0, len(models)-2):], seed, 100, testBoot)
		}
		if ops < 50 {
			t.Fatalf("seed %d: only %d disk operations were cut", seed, ops)
		}
	}
}

func (p *player) crashed(d *disk.Mem, models []model, seed uint64, keep int, boot string) {
	d = d.Crash(seed, keep)
	p.reopen(d, boot, "first opening")
	first := p.recovered(models, "after the crash")
	if r := ask(p.s, wire.Request{Kind: wire.Seal, Volume: 1, Epoch: 1000}); r.Flags&wire.FlagIntact != 0 && boot != testBoot && len(first) > 0 {
		p.t.Fatalf("seed %d: a volume is intact after a power loss", p.seed)
	}
	d = d.Crash(seed+1, 0) // at once again, before anything was flushed
	p.reopen(d, boot, "second opening")
	p.recovered([]model{first}, "after the second crash")
	p.m, p.epoch = first, 1000
	p.play(15)
	if err := p.s.Close(); err != nil {
		p.t.Fatal(err)
	}
	p.reopen(d, boot, "third opening")
	verify(p.t, p.s, p.m, p.epoch, "after going on")
}

// A crash while recovery itself runs, at every operation of it.
func TestCrashDuringRecovery(t *testing.T) {
	d := formatMem(t)
	p := newPlayer(t, 7, open(t, d, testBoot))
	p.play(100)
	mustOK(t, ask(p.s, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: p.epoch}))
	want := p.m
	tail := []model{want}
	for range 10 {
		q, after := p.next()
		mustOK(t, ask(p.s, q))
		p.m = after
		tail = append(tail, after)
	}
	for _, keep := range []int{0, 50, 100} {
		for cut := 1; cut < 8; cut++ {
			c := d.Crash(uint64(cut), keep)
			c.CutAt(c.Ops() + cut)
			_, err := Open(Config{Disk: c, BootID: "boot-2"})
			if (err == nil) != (cut > 4) && err == nil && cut < 2 {
				t.Fatalf("recovery wrote nothing")
			}
			for _, again := range []int{0, 50, 100} {
				q := *p
				q.reopen(c.Crash(uint64(cut), again), "boot-3", "after a crash in recovery")
				q.recovered(tail, "after a crash in recovery")
			}
		}
	}
}
