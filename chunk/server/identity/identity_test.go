package identity

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

func reopen(t *testing.T, path string) *Record {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func seen(life uint32, recovered, durable, written uint64) Seen {
	return Seen{Store: ids.StoreID{1}, Incarnation: 2, Boot: "a", Position: store.Position{Life: life, Recovered: recovered, Durable: durable, Written: written}}
}

// The verdict on what is found, after (life 5, durable 90, written 100) was seen.
func TestJudge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	if why := reopen(t, path).Judge(seen(1, 0, 0, 0), true); why != "" {
		t.Fatalf("a new store: %s", why)
	}
	if why := reopen(t, path).Judge(seen(2, 50, 50, 50), false); !strings.Contains(why, "not seen") {
		t.Fatalf("without a record: %q", why)
	}
	if err := reopen(t, path).Save(seen(5, 0, 90, 100), true); err != nil {
		t.Fatal(err)
	}
	r := reopen(t, path)
	other, rebooted, older := seen(6, 100, 0, 0), seen(6, 95, 0, 0), seen(6, 100, 0, 0)
	other.Store, rebooted.Boot, older.Incarnation = ids.StoreID{2}, "b", 1
	lost := rebooted
	lost.Recovered = 89
	for _, c := range []struct {
		name string
		now  Seen
		part string
	}{
		{"it goes on", seen(6, 100, 100, 100), ""},
		{"after openings that came to nothing", seen(9, 120, 120, 120), ""},
		{"a power loss", rebooted, ""},
		{"a copy from before", seen(6, 99, 99, 99), "written up to 100"},
		{"a copy from an earlier life", seen(5, 100, 100, 100), "opening 5"},
		{"a power loss and a copy", lost, "durable up to 90"},
		{"an earlier incarnation", older, "incarnation 1"},
		{"another store", other, "not seen"},
	} {
		if why := r.Judge(c.now, false); (why == "") != (c.part == "") || !strings.Contains(why, c.part) {
			t.Errorf("%s: %q, want %q", c.name, why, c.part)
		}
	}
}

// A slot that was torn while it was written leaves the other.
func TestATornSlotLeavesTheOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	r := reopen(t, path)
	for i := range uint64(4) {
		if err := r.Save(seen(1, 0, i, i), i%2 == 0); err != nil {
			t.Fatal(err)
		}
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		torn := append([]byte(nil), whole...)
		copy(torn[r.seq%2*slotBytes:], "torn")
		if err := os.WriteFile(path+".torn", torn, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := reopen(t, path+".torn"); i > 0 && (!got.had || got.seen.Durable != i-1) {
			t.Fatalf("after save %d: %+v", i, got.seen)
		}
	}
	if got := reopen(t, path); got.seen != seen(1, 0, 3, 3) {
		t.Fatalf("%+v", got.seen)
	}
}

// FuzzRecord: whatever a slot holds, its checksum being no obstacle, decoding
// neither panics nor passes limits, and what it gives encodes to the same.
func FuzzRecord(f *testing.F) {
	f.Add(encode(7, seen(1, 2, 3, 4))[:80])
	f.Fuzz(func(t *testing.T, in []byte) {
		b := make([]byte, slotBytes)
		copy(b[:slotBytes-4], in)
		le.PutUint32(b[slotBytes-4:], wire.Checksum(b[:slotBytes-4]))
		seq, s, ok := decode(b)
		if !ok {
			return
		}
		if len(s.Boot) > maxBoot {
			t.Fatalf("boot id of %d bytes", len(s.Boot))
		}
		if seq2, s2, ok := decode(encode(seq, s)); !ok || seq2 != seq || s2 != s {
			t.Fatalf("%d %+v became %d %+v", seq, s, seq2, s2)
		}
	})
}
