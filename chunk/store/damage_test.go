package store

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// sample is a cleanly closed store with some history.
func sample(t *testing.T, seed uint64) (*disk.Mem, *player) {
	d := formatMem(t)
	p := newPlayer(t, seed, open(t, d, testBoot))
	p.play(60)
	if err := p.s.Close(); err != nil {
		t.Fatal(err)
	}
	return d, p
}

// readsRightOrSays reads everything: a block is right, or the answer says that
// it is not, or the store has taken a new incarnation (and then a gateway
// compares before it reads).
func readsRightOrSays(t *testing.T, p *player, s *Store, what string) (corrupt int) {
	t.Helper()
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b += 8 {
			r := ask(s, readOf(c, b, 8, p.epoch))
			if r.Status == status.Corrupt {
				corrupt++
				continue
			}
			if mustOK(t, r); s.Incarnation() > 1 {
				continue
			}
			for i := range ids.Block(8) {
				if why := compare(p.m[blockID{c, b + i}], r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why != "" {
					t.Fatalf("%s: chunk %d block %d: %s", what, c, b+i, why)
				}
			}
		}
	}
	return corrupt
}

// One flipped bit anywhere in what the log uses, data or structure: never
// wrong data, never an older state without saying so, never a panic.
func TestEveryFlippedBitIsNoticed(t *testing.T) {
	d, p := sample(t, 11)
	rng := rand.New(rand.NewPCG(11, 1))
	var places []int64
	for off := int64(0); off < 2*blockBytes; off += 512 { // superblocks
		places = append(places, off+rng.Int64N(512))
	}
	noticed := 0
	for block := int64(logStart); block < testSize/blockBytes; block++ {
		head := make([]byte, blockBytes)
		if err := disk.ReadAt(d, head, block*blockBytes); err != nil {
			t.Fatal(err)
		}
		if _, ok := parseBatch(head); ok { // every field of a header, and some of the rest
			for _, at := range []int64{0, 4, 8, 16, 24, 32, 40, 48, 52, 54, 56, 58, 60, 64, 72, 100} {
				places = append(places, block*blockBytes+at)
			}
			places = append(places, block*blockBytes+rng.Int64N(blockBytes))
		} else if !empty(head) && rng.IntN(4) == 0 {
			places = append(places, block*blockBytes+rng.Int64N(blockBytes))
		}
	}
	if testing.Short() {
		rng.Shuffle(len(places), func(i, j int) { places[i], places[j] = places[j], places[i] })
		places = places[:100]
	}
	for _, off := range places {
		bit := uint(rng.IntN(8))
		d.Flip(off, bit)
		c := d.Crash(1, 100)
		d.Flip(off, bit)
		s, err := Open(Config{Disk: c, BootID: testBoot})
		if err != nil {
			if status.Of(err) != status.Corrupt {
				t.Fatalf("bit %d of byte %d: %v", bit, off, err)
			}
			noticed++
			continue
		}
		corrupt := readsRightOrSays(t, p, s, "flipped")
		if r := ask(s, wire.Request{Kind: wire.Seal, Volume: 1, Epoch: p.epoch}); s.Incarnation() > 1 {
			noticed++
			if r.Incarnation != 2 || s.Usage().Note == "" || r.Flags&wire.FlagIntact != 0 && r.Status == status.OK && len(p.m) > 0 && r.Version > 0 {
				t.Fatalf("byte %d: damage without a note or still intact: %+v", off, r)
			}
			knownDamageStaysKnown(t, c, s)
		}
		noticed += min(corrupt, 1)
	}
	if noticed < len(places)/2 {
		t.Fatalf("%d of %d flipped bits were noticed", noticed, len(places))
	}
}

// knownDamageStaysKnown: a damage that was reported once is not reported again.
func knownDamageStaysKnown(t *testing.T, d *disk.Mem, s *Store) {
	t.Helper()
	mustOK(t, ask(s, wire.Request{Kind: wire.Settle, Volume: 1, Epoch: 1000}))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, d, testBoot)
	if r := mustOK(t, ask(again, seal(1000))); again.Incarnation() != 2 || again.Usage().Note != "" || r.Flags&wire.FlagIntact == 0 {
		t.Fatalf("reported again: incarnation %d, %q", again.Incarnation(), again.Usage().Note)
	}
}

// A lost batch in the middle does not take what came after it along.
func TestDamageLosesOneBatchOnly(t *testing.T) {
	d := formatMem(t)
	s := open(t, d, testBoot)
	for i := range 20 {
		mustOK(t, ask(s, put(1, ids.Block(i), 1, ids.MakeVersion(1, uint64(i+1)), uint64(i+1))))
	}
	at := s.find(1, 7) - 1
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d.Flip(offset(at)+70, 2)
	s = open(t, d, testBoot)
	if s.Incarnation() != 2 {
		t.Fatalf("incarnation %d", s.Incarnation())
	}
	for i := range 20 {
		r := mustOK(t, ask(s, readOf(1, ids.Block(i), 1, 0)))
		if right := bytes.Equal(r.Data, blockOf(uint64(i+1))); right == (i == 7) {
			t.Fatalf("block %d: right is %v", i, right)
		}
	}
}

// One damaged superblock is enough to open; two are an error, not a new store.
func TestSuperblockCopies(t *testing.T) {
	d, p := sample(t, 3)
	for copies := range 2 {
		d.Flip(int64(copies)*blockBytes+30, 1)
		s, err := Open(Config{Disk: d.Crash(1, 100), BootID: testBoot})
		if copies == 0 {
			if err != nil || s.ID() != testID {
				t.Fatalf("one copy damaged: %v", err)
			}
			verify(t, s, p.m, p.epoch, "one superblock")
		} else if status.Of(err) != status.Corrupt {
			t.Fatalf("both copies damaged: %v", err)
		}
	}
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); status.Of(err) != status.Corrupt {
		t.Fatalf("a damaged store was formatted over: %v", err)
	}
}

// FuzzBatch: whatever a block holds, decoding neither panics nor passes limits.
func FuzzBatch(f *testing.F) {
	d := disk.NewMem(testSize)
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: testSeg}); err != nil {
		f.Fatal(err)
	}
	b := make([]byte, blockBytes)
	if err := disk.ReadAt(d, b, logStart*blockBytes); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		b := make([]byte, blockBytes)
		copy(b, in)
		le.PutUint32(b, batchMagic)
		le.PutUint32(b[60:], batchSum(b)) // the checksum is no obstacle
		h, ok := parseBatch(b)
		if !ok {
			return
		}
		blocks := uint32(0)
		if err := eachRecord(b, &h, func(r *record, data uint32) error {
			if r.kind == kindData {
				blocks += r.count
				if len(r.payload) != 4*int(r.count) {
					t.Fatal("a data record without its checksums")
				}
			}
			if uint64(r.block)+uint64(r.count) > maxChunkBlocks && r.kind <= kindPoison {
				t.Fatal("a record beyond any chunk")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if blocks != uint32(h.blocks) {
			t.Fatalf("%d data blocks, the header says %d", blocks, h.blocks)
		}
	})
}
