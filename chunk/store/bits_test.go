package store

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// field is one field of one structure on the disk.
type field struct {
	name string
	off  int64
	size int64
}

// recordFields are the parts of a record's 40 bytes.
var recordFields = []field{{"volume", 0, 8}, {"chunk", 8, 8}, {"version", 16, 8}, {"layer", 24, 4}, {"block", 28, 4},
	{"count", 32, 4}, {"kind", 36, 1}, {"flags", 37, 1}, {"zero", 38, 2}}

// batchFields are those of a batch before its records.
var batchFields = []field{{"magic", 0, 4}, {"life", 4, 4}, {"store", 8, 8}, {"gen", 16, 8}, {"lsn", 24, 8}, {"durable", 32, 8},
	{"written", 40, 8}, {"at", 48, 4}, {"blocks", 52, 2}, {"records", 54, 2}, {"used", 56, 2}, {"flags", 58, 2}, {"crc", 60, 4}}

// superFields are those of a superblock.
var superFields = []field{{"magic", 0, 8}, {"version", 8, 4}, {"segment blocks", 12, 4}, {"segments", 16, 4}, {"id", 20, 16},
	{"incarnation", 36, 8}, {"cluster length", 44, 4}, {"cluster", 48, 1}, {"unused", 60, 4000}, {"crc", 4092, 4}}

var kindNames = map[kind]string{kindHole: "hole", kindData: "data", kindZero: "zero", kindPoison: "poison", kindDrop: "drop", kindVolume: "volume",
	kindFree: "free", kindClean: "clean", kindHead: "head", kindSegments: "segments", kindVolumes: "volumes", kindDrops: "drops", kindGaps: "gaps", kindRoot: "root",
	kindLayers: "layers", kindLayerTable: "living"}

// fieldsOf lists every field of everything a disk holds.
func fieldsOf(t *testing.T, d disk.Disk) []field {
	t.Helper()
	var out []field
	add := func(what string, base int64, fs []field) {
		for _, f := range fs {
			out = append(out, field{what + "." + f.name, base + f.off, f.size})
		}
	}
	add("superblock", 0, superFields)
	add("its copy", blockBytes, superFields)
	b := make([]byte, blockBytes)
	for at := int64(logStart); at < d.Size()/blockBytes; at++ {
		if err := disk.ReadAt(d, b, at*blockBytes); err != nil {
			t.Fatal(err)
		}
		h, ok := parseBatch(b)
		if !ok {
			continue
		}
		what := "batch"
		if h.flags&flagHead != 0 {
			what = "head batch"
		}
		add(what, at*blockBytes, batchFields)
		pos := at*blockBytes + batchFixed
		if err := eachRecord(b, &h, func(r *record, data uint32) error {
			add(kindNames[r.kind]+" record", pos, recordFields)
			if n := int64(len(r.payload)); n > 0 {
				out = append(out, field{kindNames[r.kind] + " record.payload", pos + recordFixed, n})
			}
			if r.kind == kindData {
				out = append(out, field{"data block", (at + 1 + int64(data)) * blockBytes, int64(r.count) * blockBytes})
			}
			pos += recordFixed + int64(len(r.payload))
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if rest := (at+1)*blockBytes - pos; rest > 0 {
			out = append(out, field{"batch.rest", pos, rest})
		}
	}
	return out
}

// everyKind is a closed store whose log has records of every kind, and what it
// holds, with its checkpoints. It has been damaged before, which a head remembers.
func everyKind(t *testing.T) (*disk.Mem, *memPages, *player) {
	t.Helper()
	d := formatMem(t)
	s := open(t, d, testBoot)
	mustOK(t, ask(s, put(9, 0, 5, 1, 1)))
	bad := offset(s.find(9, 0)-1) + 70
	for b := ids.Block(0); b < 300; b += 30 { // the segment stays in use
		mustOK(t, ask(s, put(8, b, 30, 1, 1)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d.Flip(bad, 1)
	pages := newMemPages()
	s, err := Open(Config{Disk: d, BootID: testBoot, Pages: pages, IndexBytes: 3 * pageBytes, CheckpointBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	p := newPlayer(t, 5, s)
	mustOK(t, ask(s, layersOf(5, [2]ids.LayerID{0}, [2]ids.LayerID{3, 4}, [2]ids.LayerID{4})))
	p.play(150)
	for _, q := range []wire.Request{
		{Kind: wire.Install, Chunk: 7, Limit: ids.MaxVersion, Entries: []wire.Entry{{Chunk: 7, Block: 3, Version: 5, Kind: wire.EntryPoison}}},
		{Kind: wire.Drop, Chunk: 9}, {Kind: wire.Settle, Floor: 1}, layersOf(5, [2]ids.LayerID{0}, [2]ids.LayerID{4}), {Kind: wire.Flush}} {
		q.Volume, q.Epoch = 1, p.epoch
		mustOK(t, ask(s, q))
	}
	p.play(10)
	steps(s, 20)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return d, pages, p
}

// A flipped bit in every field of every structure: the right data, or an error
// for what it hit, or a store that says it is not the one it was. Never wrong
// data, and never a panic.
func TestFlippedBitInEveryField(t *testing.T) {
	d, _, p := everyKind(t)
	life := open(t, d.Crash(1, 100), testBoot).Incarnation()
	perField := 3
	if testing.Short() {
		perField = 1
	}
	rng := rand.New(rand.NewPCG(9, 9))
	fields := fieldsOf(t, d)
	rng.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
	tried, said := map[string]int{}, 0
	for _, f := range fields {
		if tried[f.name] == perField {
			continue
		}
		tried[f.name]++
		off, bit := f.off+rng.Int64N(f.size), uint(rng.IntN(8))
		what := fmt.Sprintf("bit %d of byte %d in %s", bit, off, f.name)
		c := d.Crash(1, 100)
		c.Flip(off, bit)
		s, err := Open(Config{Disk: c, BootID: testBoot})
		if err != nil {
			if k := status.Of(err); k != status.Corrupt {
				t.Fatalf("%s: %v", what, err)
			}
			said++
			continue
		}
		if s.Incarnation() != life {
			said++
			if s.Usage().Note == "" {
				t.Fatalf("%s: another incarnation without a word", what)
			}
			continue
		}
		said += min(1, corruptReads(t, p, s, what))
	}
	for k, name := range kindNames {
		if tried[name+" record.kind"] == 0 {
			t.Errorf("the log has no %s record (kind %d)", name, k)
		}
	}
	n := 0
	for _, c := range tried {
		n += c
	}
	t.Logf("%d bits in %d fields: %d showed, the others hit what is not read any more", n, len(tried), said)
	if said < n/3 {
		t.Fatalf("only %d of %d flipped bits showed", said, n)
	}
}

// A flipped bit anywhere in a saved page, of a kept checkpoint or newer: the
// same data, from an older checkpoint or from the log.
func TestFlippedBitInEveryPage(t *testing.T) {
	d, pages, p := everyKind(t)
	rng := rand.New(rand.NewPCG(4, 4))
	tried := 0
	for _, key := range slices.Sorted(maps.Keys(pages.keys)) {
		for i := range pages.keys[key] {
			c := pages.crash(1, 100, false)
			v := &c.keys[key][i]
			if v.page = bytes.Clone(v.page); len(v.page) == 0 {
				continue
			}
			at := rng.IntN(len(v.page))
			v.page[at] ^= 1 << rng.IntN(8)
			tried++
			s, err := Open(Config{Disk: d.Crash(1, 100), BootID: testBoot, Pages: c, IndexBytes: 3 * pageBytes})
			if err != nil {
				t.Fatalf("page %x, version %d, byte %d: %v", key, v.at, at, err)
			}
			verify(t, s, p.m, p.epoch, "a page was damaged")
		}
	}
	if tried < 10 {
		t.Fatalf("only %d pages were damaged", tried)
	}
	t.Logf("%d saved pages were damaged", tried)
}

// corruptReads reads block by block: right, or answered Corrupt. It returns how
// many were the latter.
func corruptReads(t *testing.T, p *player, s *Store, what string) (bad int) {
	t.Helper()
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b++ {
			r := ask(s, readOf(c, b, 1, p.epoch))
			if r.Status == status.Corrupt {
				bad++
				continue
			}
			if why := compare(p.m[blockID{c, b}], mustOK(t, r).Entries[0], r.Data); why != "" {
				t.Fatalf("%s: chunk %d block %d: %s", what, c, b, why)
			}
		}
	}
	return bad
}

// What a disk does wrong without saying so is noticed by the read that meets it.
func TestSilentFaults(t *testing.T) {
	for _, text := range []string{"write #9 lost", "write #14 misdirected 256K", "write #20 misdirected 4K", "write every 7 flips 40000",
		"write #12.. every 5 flips 3", "read 20% flips 9999", "write #3 lost; write #17 misdirected 1M; read every 9 fails EIO", "discard lost", "discard fails EOPNOTSUPP"} {
		rules, err := disk.ParseRules(text)
		if err != nil {
			t.Fatal(err)
		}
		f := disk.NewFaulty(formatMem(t), nil, 3)
		p := newPlayer(t, 21, open(t, f, testBoot))
		f.SetRules(rules)
		for range 120 {
			q, after := p.next()
			if q.Kind == wire.Read {
				if r := ask(p.s, q); r.Status != status.Corrupt {
					mustOK(t, r)
				}
				continue
			}
			mustOK(t, ask(p.s, q))
			p.m = after
			if p.rng.IntN(5) == 0 {
				p.now += 3e8
				p.s.Step(p.now)
			}
		}
		for i := range rules {
			if f.Hits()[i] == 0 && rules[i].Kind != disk.Discard {
				t.Errorf("%s: rule %d hit nothing", text, i)
			}
		}
		corruptReads(t, p, p.s, text)
	}
}
