package checkpoint

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

func TestPagesAreKeptUntilWiped(t *testing.T) {
	p, err := Open(filepath.Join(t.TempDir(), "spill"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.Wipe(); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, store.SpillPageBytes)
	for _, v := range [][]byte{{1}, want} {
		if err := p.Put([]byte("k"), v); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := p.Get([]byte("k")); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %d bytes, %v", len(got), err)
	}
	if err := p.Put([]byte("gone"), want); err != nil {
		t.Fatal(err)
	}
	if err := p.Delete([]byte("gone")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get([]byte("gone")); err == nil {
		t.Fatal("a deleted page came back")
	}
	if err := p.Wipe(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get([]byte("k")); err == nil {
		t.Fatal("a wiped page came back")
	}
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, status.Exists) {
		t.Fatalf("got %v", err)
	}
}

// sink takes one reply; the memory disk answers inside Submit.
type sink struct{ r *wire.Reply }

func (s *sink) Replies(rs []*wire.Reply) { s.r = rs[0] }

// A store whose index does not fit into memory works over Badger, and finds
// everything again after a kill left the database behind.
func TestStoreOverBadger(t *testing.T) {
	dir := t.TempDir()
	d := disk.NewMem(64 << 20)
	if err := store.Make(d, store.Format{ID: ids.NewStoreID(), Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	for life := range 2 {
		p, err := Open(filepath.Join(dir, "spill"))
		if err != nil {
			t.Fatal(err)
		}
		s, err := store.Open(store.Config{Disk: d, BootID: "b", IndexBytes: 1, Spill: p})
		if err != nil {
			t.Fatal(err)
		}
		ask := func(q wire.Request) *wire.Reply {
			var k sink
			s.Submit([]*wire.Request{&q}, &k)
			if k.r == nil || k.r.Status != status.OK {
				t.Fatalf("life %d: %s: %+v", life, q.Kind, k.r)
			}
			return k.r
		}
		for i := range 2000 {
			b, ver := ids.Block(i*7919%(1<<18)), ids.MakeVersion(1, uint64(i+1))
			data := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, ids.BlockSize/2)
			if life == 0 {
				ask(wire.Request{Kind: wire.Write, Volume: 1, Chunk: 1, Block: b, Count: 1, Version: ver, Data: data,
					Sums: []uint32{wire.BlockSum(1, 1, 0, b, ver, data)}})
			}
			if r := ask(wire.Request{Kind: wire.Read, Volume: 1, Chunk: 1, Block: b, Count: 1}); !bytes.Equal(r.Data, data) {
				t.Fatalf("life %d: block %d has other data", life, b)
			}
		}
		if life == 1 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Close(); err != nil { // life 0: the store is left as a kill leaves it
			t.Fatal(err)
		}
	}
}
