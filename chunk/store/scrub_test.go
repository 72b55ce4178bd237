package store

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// scrub runs a pass to its end.
func scrub(t *testing.T, s *Store, from uint32) Scrub {
	t.Helper()
	before := s.ScrubStatus().Passes
	if err := s.StartScrub(from, 1<<60); err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		s.Step(time.Duration(i) * time.Second)
		if st := s.ScrubStatus(); !st.Running {
			if st.Passes != before+1 {
				t.Fatalf("%d passes, want %d", st.Passes, before+1)
			}
			return st
		}
	}
	t.Fatalf("the scrub has no end: %+v", s.ScrubStatus())
	return Scrub{}
}

// A sound store: everything that is in use is read and found good, and nothing
// is changed but the copy of the superblock that was bad.
func TestScrubOfASoundStore(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	for b := ids.Block(0); b < 400; b += 20 {
		mustOK(t, ask(s, put(1, b, 20, ids.MakeVersion(1, 1), uint64(b))))
	}
	for i := range int64(2) {
		if st := scrub(t, s, 0); st.Blocks != 400 || st.BadBlocks+st.BadHeads+st.Unrescued+st.Repaired != 0 || st.Segment != st.Segments {
			t.Fatalf("%+v", st)
		}
		d.Flip(i*blockBytes+44, 1)
		if st := scrub(t, s, 0); st.Repaired != 1 {
			t.Fatalf("%+v", st)
		}
	}
	b := make([]byte, 2*blockBytes)
	if err := disk.ReadAt(d, b, 0); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if _, err := decodeSuper(b[i*blockBytes : (i+1)*blockBytes]); err != nil {
			t.Errorf("copy %d: %v", i, err)
		}
	}
	if st := scrub(t, s, 5); st.Blocks == 0 || st.Blocks >= 400 {
		t.Fatalf("a pass that goes on in the middle: %+v", st)
	}
	if err := s.StartScrub(0, 0); status.Of(err) != status.Invalid {
		t.Fatalf("a scrub without pace: %v", err)
	}
	if st := s.ScrubStatus(); st.Running {
		t.Fatal("it runs")
	}
}

// The pace holds: a pass reads no more per second than it may.
func TestScrubPace(t *testing.T) {
	s := open(t, formatMem(t), testBoot)
	for b := ids.Block(0); b < 600; b += 60 {
		mustOK(t, ask(s, put(1, b, 60, ids.MakeVersion(1, 1), uint64(b))))
	}
	const pace = 64 << 10
	if err := s.StartScrub(0, pace); err != nil {
		t.Fatal(err)
	}
	now := time.Duration(0)
	for s.ScrubStatus().Running {
		now += 100 * time.Millisecond
		s.Step(now)
		burst := uint64(windowBlocks+64) * blockBytes
		if read := s.ScrubStatus().ReadBytes; read > uint64(now.Seconds()*pace)+burst {
			t.Fatalf("%d bytes after %v", read, now)
		}
	}
	if want := 600 * blockBytes / pace * time.Second / 2; now < want {
		t.Fatalf("all was read in %v", now)
	}
}

// Bad data is found where it is in use, told to the gateway of its volume alone,
// and forgotten when it is repaired, overwritten or dropped. What the disk
// cannot read at all counts as bad.
func TestScrubFindsBadData(t *testing.T) {
	d := formatMem(t)
	f := disk.NewFaulty(d, nil, 1)
	s := open(t, f, testBoot)
	for b := ids.Block(0); b < 100; b++ {
		mustOK(t, ask(s, put(1, b, 1, ids.MakeVersion(1, 1), uint64(b))))
	}
	dead := s.find(1, 5)
	mustOK(t, ask(s, put(1, 5, 1, ids.MakeVersion(1, 2), 500)))
	d.Flip(offset(dead), 1)
	d.Flip(offset(s.find(1, 7)), 1)
	d.Flip(offset(s.find(1, 30))+9, 1)
	unread := offset(s.find(1, 60))
	rules := disk.Rules{{Kind: disk.Read, First: 1, Last: 1 << 60, From: unread, To: unread + 1, Effect: disk.Fails, Errno: 5}}
	f.SetRules(rules)
	want := func(blocks ...ids.Block) {
		t.Helper()
		bad := s.BadBlocks()
		if len(bad) != len(blocks) {
			t.Fatalf("bad: %+v, want %v", bad, blocks)
		}
		for i, b := range blocks {
			if bad[i] != (Bad{1, 1, 0, b, ids.MakeVersion(1, 1)}) {
				t.Fatalf("bad: %+v, want %v", bad, blocks)
			}
		}
		r := mustOK(t, ask(s, wire.Request{Kind: wire.Damaged, Volume: 1}))
		if len(r.Entries) != len(blocks) {
			t.Fatalf("told: %+v, want %v", r.Entries, blocks)
		}
	}
	if st := scrub(t, s, 0); st.BadBlocks != 3 || st.BadHeads != 0 {
		t.Fatalf("%+v", st)
	}
	want(7, 30, 60)
	mustOK(t, ask(s, put(2, 0, 1, 1, 1)))
	other := put(1, 7, 1, 1, 1)
	other.Volume, other.Sums[0] = 2, wire.BlockSum(2, 1, 0, 7, 1, other.Data)
	mustOK(t, ask(s, other))
	if r := mustOK(t, ask(s, wire.Request{Kind: wire.Damaged, Volume: 2})); len(r.Entries) != 0 {
		t.Fatalf("another volume is told: %+v", r.Entries)
	}
	if r := mustOK(t, ask(s, wire.Request{Kind: wire.Damaged, Volume: 1, Count: 2})); len(r.Entries) != 2 || r.Flags&wire.FlagMore == 0 {
		t.Fatalf("two at most: %+v", r)
	}
	good := put(1, 7, 1, ids.MakeVersion(1, 1), 7)
	mustOK(t, ask(s, wire.Request{Kind: wire.Install, Flags: wire.FlagRepair, Volume: 1, Chunk: 1, Limit: ids.MakeVersion(1, 2), Data: good.Data,
		Entries: []wire.Entry{{Chunk: 1, Block: 7, Version: ids.MakeVersion(1, 1), Sum: good.Sums[0], Kind: wire.EntryData}}}))
	want(30, 60)
	mustOK(t, ask(s, put(1, 30, 1, ids.MakeVersion(1, 3), 3)))
	want(60)
	mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 1}))
	want()
}

// Whatever batch has lost its records, a scrub writes them anew: after the next
// opening, killed or out of power, nothing is missing, and nothing is taken for
// damage. Data that is bad too stays an error.
func TestScrubRescuesRecords(t *testing.T) {
	d0, p := sample(t, 31)
	var places []int64
	for _, f := range fieldsOf(t, d0) {
		if f.name == "batch.magic" || f.name == "head batch.magic" {
			places = append(places, f.off)
		}
	}
	rescued := 0
	for i, at := range places {
		d := d0.Crash(1, 100)
		s := open(t, d, testBoot)
		d.Flip(at+int64(i%64), 3)
		if i%3 == 0 && i+1 < len(places) { // and the one after it
			d.Flip(places[i+1]+20, 1)
		}
		bad := blockID{}
		if i%4 == 1 { // and a block of data in it
			for k, st := range p.m {
				if e, err := s.idx.get(s.vols[1].chunk(k.c, 0, false), k.b); err != nil {
					t.Fatal(err)
				} else if st.kind == wire.EntryData && offset(e.loc) > at && offset(e.loc) < at+40*blockBytes && (i+1 == len(places) || offset(e.loc) < places[i+1]) {
					d.Flip(offset(e.loc), 1)
					bad = k
					break
				}
			}
		}
		st := scrub(t, s, 0)
		rescued += int(st.BadHeads)
		if st.Unrescued > 0 || bad.c > 0 && st.BadBlocks == 0 {
			t.Fatalf("byte %d: %+v", at, st)
		}
		if st = scrub(t, s, 0); st.BadHeads > 0 {
			t.Fatalf("byte %d: found again: %+v", at, st)
		}
		mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: p.epoch}))
		for _, boot := range []string{testBoot, "boot-2"} {
			again := open(t, d.Crash(2, 0), boot)
			if n := again.Usage().Note; n != "" || again.Incarnation() != 1 {
				t.Fatalf("byte %d: taken for damage: %s", at, n)
			}
			if bad.c > 0 {
				if n := corruptReads(t, p, again, "a rescued batch"); n != 1 {
					t.Fatalf("byte %d: %d blocks cannot be read, one was damaged", at, n)
				}
				continue
			}
			verify(t, again, p.m, p.epoch, "a rescued batch")
		}
	}
	if rescued < len(places)/3 {
		t.Fatalf("%d of %d damaged batches were found", rescued, len(places))
	}
	t.Logf("%d batches damaged, %d of them in segments in use", len(places), rescued)
}

// The power goes before every disk operation of a scrub that rescues: all is
// there afterwards, or the store says that it was damaged.
func TestCrashDuringRescue(t *testing.T) {
	d0, p := sample(t, 31)
	var places []int64
	for _, f := range fieldsOf(t, d0) {
		if f.name == "batch.magic" {
			places = append(places, f.off)
		}
	}
	said, whole := 0, 0
	for i := 0; i < len(places); i += 7 {
		for cut := 1; cut < 12; cut++ {
			d := d0.Crash(1, 100)
			s := open(t, d, testBoot)
			d.Flip(places[i], 3)
			d.CutAt(d.Ops() + cut)
			if err := s.StartScrub(0, 1<<30); err != nil {
				t.Fatal(err)
			}
			steps(s, 30)
			for _, keep := range []int{0, 50, 100} {
				again := open(t, d.Crash(uint64(cut), keep), "boot-2")
				if again.Incarnation() > 1 {
					said++
					continue
				}
				whole++
				verify(t, again, p.m, p.epoch, "a crash while rescuing")
			}
		}
	}
	if said == 0 || whole == 0 {
		t.Fatalf("%d times damage was reported, %d times all was there: both should happen", said, whole)
	}
}

// A block that was bad already is moved by compaction, then a flush is answered
// and the power goes before any batch says that the flush was done: what the
// flush covered is there, behind the bad block too.
func TestABadBlockThatMovesDoesNotCutTheLog(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(1, 0, 150, ids.MakeVersion(1, 1), 1)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	s.Step(2 * time.Second) // and the log says so
	bad := ids.Block(100)
	first := s.segOf(s.find(1, bad))
	d.Flip(offset(s.find(1, bad)), 1)
	for b := ids.Block(0); b < 150; b++ { // little else is left in its segment
		if b < bad-2 || b > bad+2 {
			mustOK(t, ask(s, put(1, b, 1, ids.MakeVersion(1, 2), uint64(b))))
		}
	}
	buf := make([]byte, testSeg)
	if err := disk.ReadAt(d, buf, offset(s.base(first))); err != nil {
		t.Fatal(err)
	}
	var out outbox // compaction's step, and no more: no sync follows it
	s.mu.Lock()
	s.compact.victim, s.compact.at = first, 0
	first.pins.Add(1)
	err := s.compact.copy(buf[:first.tail*blockBytes])
	s.proceed(&out)
	s.unlock(&out)
	if err != nil || s.segOf(s.find(1, bad)) == first {
		t.Fatalf("the bad block is not moved: %v", err)
	}
	mustOK(t, ask(s, put(2, 0, 5, ids.MakeVersion(1, 3), 7)))
	mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
	s = open(t, d.Crash(1, 0), "boot-2")
	if n := s.Usage().Note; n != "" {
		t.Fatal(n)
	}
	for b := range ids.Block(150) {
		r := ask(s, readOf(1, b, 1, 0))
		if b == bad {
			if r.Status != status.Corrupt {
				t.Fatalf("the bad block: %v", r.Status)
			}
			continue
		}
		mustOK(t, r)
	}
	if r := mustOK(t, ask(s, readOf(2, 0, 5, 0))); r.Entries[4].Kind != wire.EntryData {
		t.Fatal("what was flushed behind the bad block is gone")
	}
}
