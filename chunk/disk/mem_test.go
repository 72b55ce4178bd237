package disk

import (
	"bytes"
	"path/filepath"
	"testing"
)

// What was synced survives every crash; what was not survives one that keeps
// everything, and is gone after one that keeps nothing.
func TestCrashKeepsWhatWasSynced(t *testing.T) {
	m := NewMem(1 << 20)
	old, fresh := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	for _, err := range []error{WriteAt(m, old, 0), SyncAll(m), WriteAt(m, fresh, 0), WriteAt(m, fresh, 8192)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for keep, want := range map[int][]byte{0: old, 100: fresh} {
		got := make([]byte, 4096)
		if err := ReadAt(m.Crash(1, keep), got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("keeping %d %%: byte %d, %v", keep, got[0], err)
		}
	}
	torn := make([]byte, 4096)
	if err := ReadAt(m.Crash(1, 50), torn, 0); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(torn); i += 512 {
		if s := torn[i : i+512]; !bytes.Equal(s, old[:512]) && !bytes.Equal(s, fresh[:512]) {
			t.Fatalf("sector at %d is neither old nor new", i)
		}
	}
}

func TestFileKeepsDataAndIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	f, err := Create(path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 8192)
	if err := WriteAt(f, want, 4096); err != nil {
		t.Fatal(err)
	}
	if err := SyncAll(f); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil {
		t.Fatal("a second open succeeded")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = Open(path); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8192)
	if err := ReadAt(f, got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %d, %v", got[0], err)
	}
	if f.Size() != 1<<20 {
		t.Fatalf("size %d", f.Size())
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
