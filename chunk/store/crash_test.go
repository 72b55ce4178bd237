package store

import (
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
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
	seeds, step := uint64(4), 1
	if testing.Short() {
		seeds, step = 2, 5
	}
	for seed := range seeds {
		ops := 0
		for cut := 1; ; cut++ {
			cut += (step - 1) + int(seed/2)*3 // later seeds go in steps
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

// The process is killed, and while the next one recovers the power goes, before
// each disk operation of the recovery: what was flushed is there, and what the
// page cache still held may be lost, but nothing is built on it.
func TestCrashDuringRecovery(t *testing.T) {
	seeds := uint64(12)
	if testing.Short() {
		seeds = 3
	}
	for seed := range seeds {
		for cut := 1; cut <= 5; cut++ {
			d := formatMem(t)
			p := newPlayer(t, seed, open(t, d, testBoot))
			tail := p.cutRun(60)
			d.CutAt(d.Ops() + cut)
			if _, err := Open(Config{Disk: d, BootID: testBoot}); err == nil && cut < 4 {
				t.Fatalf("seed %d: recovery was ready after %d disk operations, without its syncs", seed, cut-1)
			}
			for _, keep := range []int{0, 50, 100} {
				q := *p
				q.reopen(d.Crash(uint64(cut), keep), "boot-3", "after a crash in recovery")
				q.recovered(tail, "after a crash in recovery")
			}
		}
	}
}

// A segment is given up by a record that reached the disk while the writes that
// superseded the segment's content did not: it is still in use.
func TestGivenUpBehindTheCut(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 150, ids.MakeVersion(1, 1), 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	closed := s.segs[1]
	if closed.state != segClosed {
		t.Fatalf("segment 1 is in state %d", closed.state)
	}
	last := ids.Block(149) // the last block of segment 1
	for s.segOf(s.find(1, last)) != closed {
		last--
	}
	mustOK(t, ask(s, put(1, 0, int(last), ids.MakeVersion(1, 2), 1000)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	mustOK(t, ask(s, put(1, last, 1, ids.MakeVersion(1, 2), 1000+uint64(last))))
	if closed.live > 0 {
		t.Fatalf("segment 1 still holds %d blocks", closed.live)
	}
	torn := s.find(1, last)
	d.CutAt(d.Ops() + 2) // the record is written, the sync is not done
	s.Step(0)
	if closed.state != segLeaving {
		t.Fatalf("segment 1 is in state %d", closed.state)
	}
	d.Flip(offset(torn), 1)
	s = open(t, d.Crash(1, 100), "boot-2")
	m := model{}
	for b := range ids.Block(150) {
		m[blockID{1, b}] = state{wire.EntryData, ids.MakeVersion(1, 1), 1 + uint64(b)}
		if b < last {
			m[blockID{1, b}] = state{wire.EntryData, ids.MakeVersion(1, 2), 1000 + uint64(b)}
		}
	}
	verify(t, s, m, 0, "the old state")
}

// The power goes between the sync that makes a given-up segment's record
// durable and each of the operations that follow it: all of what that sync
// covered is there, although no mark in the log says so yet.
func TestGivenUpButNotMarked(t *testing.T) {
	for cut := 3; cut <= 8; cut++ {
		d := formatMem(t)
		s := open(t, d, testBoot)
		mustOK(t, ask(s, put(1, 0, 150, ids.MakeVersion(1, 1), 1)))
		mustOK(t, ask(s, put(1, 0, 150, ids.MakeVersion(1, 2), 1000))) // nothing is marked durable yet
		mustOK(t, ask(s, put(1, 0, 1, ids.MakeVersion(1, 3), 5000)))
		d.CutAt(d.Ops() + cut)
		s.Step(0)
		m := model{}
		for b := range ids.Block(150) {
			m[blockID{1, b}] = state{wire.EntryData, ids.MakeVersion(1, 2), 1000 + uint64(b)}
		}
		m[blockID{1, 0}] = state{wire.EntryData, ids.MakeVersion(1, 3), 5000}
		for _, keep := range []int{0, 50, 100} {
			p := &player{t: t}
			p.reopen(d.Crash(uint64(cut), keep), "boot-2", "after the sync")
			verify(t, p.s, m, 0, "after the sync")
		}
	}
}

// The power goes and takes a tail; the store opens, and is killed before it has
// written anything more, or its first write fails. The next opening, under the
// same boot, cuts the log at the same place: what an earlier boot had written
// and lost is no damage.
func TestKilledRightAfterATailWasCut(t *testing.T) {
	for _, fails := range []bool{false, true} {
		d := formatMem(t)
		s := open(t, d, testBoot)
		mustOK(t, ask(s, put(1, 0, 5, ids.MakeVersion(1, 1), 1)))
		mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
		for b := ids.Block(10); b < 20; b++ { // written, and the next batch says so, but not durable
			mustOK(t, ask(s, put(1, b, 1, ids.MakeVersion(1, uint64(b)), uint64(b))))
		}
		last := offset(s.find(1, 19) - 1)
		torn := make([]byte, blockBytes)
		if err := disk.ReadAt(d, torn, last); err != nil {
			t.Fatal(err)
		}
		d = d.Crash(1, 0) // of the tail, only the last batch's records have come to the disk
		if err := disk.WriteAt(d, torn, last); err != nil {
			t.Fatal(err)
		}
		if err := disk.SyncAll(d); err != nil {
			t.Fatal(err)
		}
		for opening := range 4 {
			s, err := Open(Config{Disk: d, BootID: "boot-2"})
			if err != nil {
				t.Fatal(err)
			}
			if n := s.Usage().Note; n != "" {
				t.Fatalf("opening %d: %s", opening, n)
			}
			r := mustOK(t, ask(s, readOf(1, 0, 20, 0)))
			if r.Entries[4].Kind != wire.EntryData || r.Entries[10].Kind != wire.EntryHole {
				t.Fatalf("opening %d: %+v", opening, r.Entries)
			}
			if fails {
				d.FailAt(d.Ops() + 1)
				if r := ask(s, put(1, 30, 1, ids.MakeVersion(1, 90), 1)); r.Status != status.IO {
					t.Fatalf("the write: %v", r.Status)
				}
			}
			d = d.Crash(1, 100)
		}
	}
}
