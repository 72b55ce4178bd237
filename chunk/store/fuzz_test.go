package store

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// FuzzSuper: a superblock decodes to what encodes to the same, or is refused
// with a kind.
func FuzzSuper(f *testing.F) {
	p := super{ID: testID, Incarnation: 3, Cluster: "c", segBlocks: 64, segments: 40}
	f.Add(p.encode()[:128])
	f.Fuzz(func(t *testing.T, in []byte) {
		b := make([]byte, blockBytes)
		copy(b[:blockBytes-4], in)
		le.PutUint32(b[blockBytes-4:], wire.Checksum(b[:blockBytes-4])) // the checksum is no obstacle
		p, err := decodeSuper(b)
		if err != nil {
			switch status.Of(err) {
			case status.NotFound, status.Corrupt, status.Unsupported:
				return
			}
			t.Fatalf("no kind: %v", err)
		}
		again, err := decodeSuper(p.encode())
		if err != nil || *again != *p {
			t.Fatalf("%+v became %+v: %v", p, again, err)
		}
		// What it says is believed by nobody before it fits the disk.
		d := disk.NewMem(testSize)
		if err := disk.WriteAt(d, b, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Disk: d, BootID: testBoot}); err == nil {
			t.Fatal("a superblock without a log was opened")
		}
	})
}

// edit is one change of a disk's image: 2 bytes for the block, 2 for the byte in
// it, 1 for what is put there.
const editBytes = 5

// images are stores to edit.
func images(t testing.TB) (out []*disk.Mem) {
	for seed := range uint64(3) {
		d := formatMem(t)
		s := open(t, d, testBoot)
		p := newPlayer(t, seed, s)
		for i := range 25 {
			q, after := p.next()
			ask(s, q)
			p.m = after
			if i%5 == 4 {
				s.Step(time.Duration(i) * time.Second)
			}
		}
		if seed == 1 { // a chunk that was dropped, layers, and a checkpoint's root
			mustOK(t, ask(s, wire.Request{Kind: wire.Drop, Volume: 1, Epoch: p.epoch, Chunk: 3}))
		}
		if seed > 0 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, d, testBoot)
			mustOK(t, ask(s, put(9, 1, 2, 1, 1)))
		}
		if seed == 2 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		out = append(out, d.Crash(1, 100))
	}
	return out
}

// FuzzOpen: whatever a disk holds, checksums of records included, a store opens
// on it or says why not; what it then reads has its checksum, it goes on
// working, and opens again.
func FuzzOpen(f *testing.F) {
	all := images(f)
	f.Add(uint8(0), true, []byte{})
	for field := range byte(64) {
		f.Add(uint8(field%3), true, []byte{16, 0, field, 0, 77})
	}
	f.Fuzz(func(t *testing.T, image uint8, sums bool, edits []byte) {
		d := all[int(image)%len(all)].Crash(1, 100)
		for ; len(edits) >= editBytes && len(edits) <= 40*editBytes; edits = edits[editBytes:] {
			block := int64(le.Uint16(edits)) % (d.Size() / blockBytes)
			b := make([]byte, blockBytes)
			if err := disk.ReadAt(d, b, block*blockBytes); err != nil {
				t.Fatal(err)
			}
			b[le.Uint16(edits[2:])%blockBytes] = edits[4]
			switch {
			case !sums:
			case block < 2:
				le.PutUint32(b[blockBytes-4:], wire.Checksum(b[:blockBytes-4]))
			default:
				le.PutUint32(b[60:], batchSum(b))
			}
			if err := disk.WriteAt(d, b, block*blockBytes); err != nil {
				t.Fatal(err)
			}
		}
		if rep, err := Inspect(d, nil); err == nil && rep.ID == "" {
			t.Fatal("a report without a store")
		}
		for range 2 {
			s, err := Open(Config{Disk: d, BootID: testBoot})
			if err != nil {
				if status.Of(err) == status.Internal {
					t.Fatalf("no kind: %v", err)
				}
				return
			}
			exercise(t, s)
			if err := s.Close(); err != nil && s.Usage().State == "ok" {
				t.Fatalf("a store that is well does not close: %v", err)
			}
		}
	})
}

// exercise reads all, writes some and lets the store work.
func exercise(t *testing.T, s *Store) {
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b += 32 {
			r := ask(s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Epoch: 1 << 20, Chunk: c, Block: b, Count: 32})
			if r.Status != status.OK {
				continue
			}
			for i, e := range r.Entries {
				if e.Kind == wire.EntryData && wire.BlockSum(1, c, e.Layer, e.Block, e.Version, r.Data[i*blockBytes:(i+1)*blockBytes]) != e.Sum {
					t.Fatal("data without its checksum")
				}
			}
		}
	}
	for i := range 20 {
		q := put(1, ids.Block(i), 1, ids.MakeVersion(1<<20, uint64(i)), uint64(i))
		q.Epoch = 1 << 20
		ask(s, q)
		s.Step(time.Duration(i) * time.Second)
	}
	ask(s, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: 1 << 20})
	if s.Usage().State == "" {
		t.Fatal("a store without a state")
	}
}

// FuzzRequests: whatever arrives in frames, a store answers each request once,
// and what it has accepted it still has after it was opened again.
func FuzzRequests(f *testing.F) {
	frame := func(qs ...wire.Request) (b []byte) {
		for i := range qs {
			b = wire.AppendRequest(b, &qs[i])
			b = append(b, qs[i].Data...)
		}
		return b
	}
	w := put(1, 3, 2, 9, 7)
	f.Add(frame(w, wire.Request{Kind: wire.Read, Volume: 1, Chunk: 1, Block: 3, Count: 2, Flags: wire.FlagEntries}))
	f.Add(frame(wire.Request{Kind: wire.Zero, Volume: 1, Chunk: 1, Block: 3, Count: 700, Version: 8}, wire.Request{Kind: wire.Digest, Volume: 1, Chunk: 1, Count: 4096}))
	f.Add(frame(w, wire.Request{Kind: wire.Install, Volume: 1, Chunk: 1, Limit: 100, Entries: []wire.Entry{{Chunk: 1, Block: 3, Kind: wire.EntryPoison, Version: 9}}}))
	f.Add(frame(wire.Request{Kind: wire.Seal, Volume: 1, Epoch: 5, Count: 2}, wire.Request{Kind: wire.Settle, Volume: 1, Epoch: 5, Floor: 3}, wire.Request{Kind: wire.Flush, Volume: 1, Epoch: 5}))
	f.Add(frame(w, wire.Request{Kind: wire.Drop, Volume: 1, Chunk: 1}, wire.Request{Kind: wire.List, Volume: 1, Chunk: 1, Count: 100}))
	f.Add(frame(w, wire.Request{Kind: wire.Newer, Volume: 1, Version: 3}, wire.Request{Kind: wire.Stat}, wire.Request{Kind: wire.Damaged, Volume: 1}))
	f.Add(frame(w, wire.Request{Kind: wire.Layers, Volume: 1, Layer: 4, Entries: []wire.Entry{{Layer: 4}, {Layer: 2}}}, wire.Request{Kind: wire.Merge, Volume: 1, Chunk: 1, Layer: 2, Block: 0, Count: 10}))
	f.Fuzz(func(t *testing.T, in []byte) {
		d := formatMem(t)
		s := open(t, d, testBoot)
		for n := uint64(1); n < 30 && len(in) >= wire.HeaderBytes; n++ {
			q, rest := nextRequest(in)
			if in = rest; q == nil {
				continue
			}
			ask(s, *q)
			s.Step(time.Duration(n) * time.Second)
		}
		before := contents(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, d, testBoot)
		if n := s.Usage().Note; n != "" {
			t.Fatal(n)
		}
		if after := contents(t, s); after != before {
			t.Fatalf("held\n%s\nand after it was opened again\n%s", before, after)
		}
	})
}

// nextRequest takes a request from frames whose checksums are no obstacle: the
// frame's own, and those of its data.
func nextRequest(in []byte) (*wire.Request, []byte) {
	b := slices.Clone(in)
	body, data := int(le.Uint32(b[16:])%(64<<10)), int(le.Uint32(b[20:])%(64<<10))
	body = min(body, len(b)-wire.HeaderBytes)
	data = min(data, len(b)-wire.HeaderBytes-body)
	copy(b, "CRN1\x01")
	le.PutUint32(b[16:], uint32(body))
	le.PutUint32(b[20:], uint32(data))
	at, end := b[wire.HeaderBytes:][:body], b[wire.HeaderBytes+body:]
	le.PutUint32(b[24:], wire.Checksum(at))
	le.PutUint32(b[28:], wire.Checksum(b[:28]))
	h, err := wire.ParseHeader(b)
	if err != nil {
		return nil, end[data:]
	}
	q, err := wire.DecodeRequest(h, at)
	if err != nil {
		return nil, end[data:]
	}
	q.Store, q.Data = ids.StoreID{}, end[:data]
	for i := range q.Sums {
		if len(q.Data) >= (i+1)*blockBytes {
			q.Sums[i] = wire.BlockSum(q.Volume, q.Chunk, q.Layer, q.Block+ids.Block(i), q.Version, q.Data[i*blockBytes:(i+1)*blockBytes])
		}
	}
	for i, n := 0, 0; i < len(q.Entries); i++ {
		if e := &q.Entries[i]; e.Kind == wire.EntryData && len(q.Data) >= (n+1)*blockBytes {
			e.Sum = wire.BlockSum(q.Volume, q.Chunk, e.Layer, e.Block, e.Version, q.Data[n*blockBytes:(n+1)*blockBytes])
			n++
		}
	}
	return q, end[data:]
}

// contents is what a store says it has.
func contents(t *testing.T, s *Store) string {
	t.Helper()
	var out []string
	for id, n := range s.Volumes() {
		if n > 0 {
			out = append(out, fmt.Sprintf("volume %d: %d bytes", id, n))
		}
	}
	slices.Sort(out)
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for l := range ids.LayerID(5) {
			r := ask(s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries | wire.FlagRaw, Volume: 1, Epoch: 1<<32 - 1, Chunk: c, Layer: l, Count: 16})
			out = append(out, fmt.Sprintf("chunk %d, layer %d: %d %v", c, l, r.Status, r.Entries))
		}
	}
	return strings.Join(out, "\n")
}
