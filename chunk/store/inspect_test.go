package store

import (
	"bytes"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

func wholeDisk(t *testing.T, d disk.Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if err := disk.ReadAt(d, b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// A whole store is proved whole, and nothing is written to its disk; a bit
// flipped in anything that is in use is named as damage, or shows as an older
// state that was cut off as a tail is.
func TestInspect(t *testing.T) {
	d, _, p := everyKind(t)
	before := wholeDisk(t, d)
	r, err := Inspect(d, nil)
	if err != nil || len(r.Damage) > 0 {
		t.Fatalf("a whole store: %v, %v", err, r.Damage)
	}
	if !bytes.Equal(wholeDisk(t, d), before) {
		t.Fatal("the inspection has changed the disk")
	}
	data := 0
	for _, s := range p.m {
		if s.kind == wire.EntryData {
			data++
		}
	}
	if !r.Clean || r.KnownGaps != 1 || len(r.Segments) < 3 || r.Incarnation != 2 || r.ID != testID.String() {
		t.Fatalf("%+v", r)
	}
	inChunks, records := 0, map[string]int{}
	for _, c := range r.Volumes[0].Chunks {
		if c.ID <= testChunks {
			inChunks += int(c.Data)
		}
	}
	for _, s := range r.Segments {
		for k, n := range s.Records {
			records[k] += n
		}
	}
	if inChunks != data || r.BlocksVerified != r.Volumes[0].Live || records["head"] != len(r.Segments) || records["poison"] == 0 {
		t.Fatalf("%d blocks of data, want %d; %d verified of %d; records %v", inChunks, data, r.BlocksVerified, r.Volumes[0].Live, records)
	}
	named := 0
	for i, f := range fieldsOf(t, d) {
		if i%23 != 0 && f.name != "data block" && !strings.HasPrefix(f.name, "superblock") {
			continue
		}
		c := d.Crash(1, 100)
		c.Flip(f.off, 1)
		r, err := Inspect(c, nil)
		switch {
		case err != nil && status.Of(err) != status.Corrupt:
			t.Fatalf("%s: %v", f.name, err)
		case err != nil || len(r.Damage) > 0:
			named++
		case strings.HasPrefix(f.name, "superblock"):
			t.Fatalf("%s: not named", f.name)
		}
	}
	if named < 20 {
		t.Fatalf("only %d damages were named", named)
	}
	if _, err := Inspect(disk.NewMem(1<<20), nil); status.Of(err) != status.NotFound {
		t.Fatalf("an empty disk: %v", err)
	}
}
