package disk

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

func faulty(t *testing.T, rules string) (*Faulty, *Mem) {
	t.Helper()
	rs, err := ParseRules(rules)
	if err != nil {
		t.Fatal(err)
	}
	m := NewMem(1 << 20)
	return NewFaulty(m, rs, 1), m
}

func fill(n int, x byte) []byte { return bytes.Repeat([]byte{x}, n) }

func content(t *testing.T, d Disk, off int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if err := ReadAt(d, b, off); err != nil {
		t.Fatal(err)
	}
	return b
}

// Each effect does what the table of Rules says, to the operation it is for.
func TestEffects(t *testing.T) {
	t.Run("fails", func(t *testing.T) {
		f, m := faulty(t, "write #2 fails EIO; sync fails ENOSPC")
		errs := []error{WriteAt(f, fill(4096, 1), 0), WriteAt(f, fill(4096, 2), 0), WriteAt(f, fill(4096, 3), 4096)}
		if errs[0] != nil || !errors.Is(errs[1], syscall.EIO) || status.Of(errs[1]) != status.IO || errs[2] != nil {
			t.Fatal(errs)
		}
		if content(t, m, 0, 1)[0] != 1 {
			t.Fatal("a failed write was done")
		}
		if err := SyncAll(f); status.Of(err) != status.NoSpace {
			t.Fatal(err)
		}
		if h := f.Hits(); h[0] != 1 || h[1] != 1 {
			t.Fatalf("hits %v", h)
		}
	})
	t.Run("lost", func(t *testing.T) {
		f, m := faulty(t, "write at 4096..8192 lost")
		for off := int64(0); off < 12288; off += 4096 {
			if err := WriteAt(f, fill(4096, 9), off); err != nil {
				t.Fatal(err)
			}
		}
		if got := content(t, m, 0, 12288); got[0] != 9 || got[4096] != 0 || got[8192] != 9 {
			t.Fatalf("%d %d %d", got[0], got[4096], got[8192])
		}
	})
	t.Run("misdirected", func(t *testing.T) {
		f, m := faulty(t, "write misdirected 8K")
		if err := WriteAt(f, fill(4096, 7), 4096); err != nil {
			t.Fatal(err)
		}
		if err := WriteAt(f, fill(4096, 8), 1<<20-4096); err != nil { // round the end
			t.Fatal(err)
		}
		if content(t, m, 4096, 1)[0] != 0 || content(t, m, 12288, 1)[0] != 7 || content(t, m, 1<<20-4096, 1)[0] != 0 {
			t.Fatal("it went elsewhere")
		}
	})
	t.Run("flips", func(t *testing.T) {
		f, m := faulty(t, "write #1 flips 13; read #2 flips 32768")
		want := fill(4096, 0)
		if err := WriteAt(f, want, 0); err != nil {
			t.Fatal(err)
		}
		if want[1] != 0 {
			t.Fatal("the caller's buffer was changed")
		}
		if got := content(t, m, 0, 2); got[1] != 1<<5 {
			t.Fatalf("%v", got)
		}
		if a, b := content(t, f, 4096, 4096), content(t, f, 4096, 4096); a[0] != 0 || b[0] != 1 {
			t.Fatalf("%d %d", a[0], b[0])
		}
	})
	t.Run("torn", func(t *testing.T) {
		f, m := faulty(t, "write torn 1100")
		if err := WriteAt(f, fill(4096, 5), 0); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		if got := content(t, m, 0, 2048); got[1023] != 5 || got[1024] != 0 {
			t.Fatal("not torn between sectors")
		}
	})
	t.Run("slow", func(t *testing.T) {
		f, m := faulty(t, "write slow 20ms")
		var later func()
		f.after = func(d time.Duration, do func()) {
			if d != 20*time.Millisecond {
				t.Errorf("delay %v", d)
			}
			later = do
		}
		done := false
		f.Submit(&Op{Kind: Write, Bufs: [][]byte{fill(512, 3)}, Done: func(err error) { done = err == nil }})
		if done || content(t, m, 0, 1)[0] != 0 {
			t.Fatal("not slow")
		}
		later()
		if !done || content(t, m, 0, 1)[0] != 3 {
			t.Fatal("never done")
		}
	})
	t.Run("hangs", func(t *testing.T) {
		f, m := faulty(t, "write hangs")
		done := false
		f.Submit(&Op{Kind: Write, Bufs: [][]byte{fill(512, 3)}, Done: func(err error) { done = err == nil }})
		if content(t, f, 0, 1); done {
			t.Fatal("it does not hang")
		}
		if err := f.Close(); err != nil || !done || content(t, m, 0, 1)[0] != 3 {
			t.Fatalf("a hanging write has no end: %v", err)
		}
	})
}

// Conditions choose the operations they say.
func TestConditions(t *testing.T) {
	for rule, want := range map[string]string{
		"write #3 fails EIO":                      "..x.......",
		"write #3..5 fails EIO":                   "..xxx.....",
		"write #8.. fails EIO":                    ".......xxx",
		"write every 4 fails EIO":                 "...x...x..",
		"write #2.. every 4 fails EIO":            "....x...x.",
		"any #1 fails EIO":                        "x.........",
		"write at 8K..16K fails EIO":              "..xx......",
		"write at 8K..1M #2 fails EIO":            "...x......",
		"write #1 lost; write #1..2 fails EIO":    ".x........",
		"read #1 fails EIO; write #10 fails EIO":  ".........x",
		"write 100% fails EIO # a comment":        "xxxxxxxxxx",
		"\n # nothing \n write #5 fails EIO \n\n": "....x.....",
	} {
		f, _ := faulty(t, rule)
		var got strings.Builder
		for i := range int64(10) {
			if WriteAt(f, fill(4096, 1), i*4096) != nil {
				got.WriteByte('x')
			} else {
				got.WriteByte('.')
			}
		}
		if got.String() != want {
			t.Errorf("%q: %s, want %s", rule, got.String(), want)
		}
	}
	a, _ := faulty(t, "write 30% fails EIO")
	for range 1000 {
		_ = WriteAt(a, fill(512, 1), 0) // whether it fails is what is counted
	}
	if h := a.Hits()[0]; h < 200 || h > 400 {
		t.Errorf("30%% of 1000 are %d", h)
	}
}

// A wrong rule is named, with the word that is wrong.
func TestWrongRules(t *testing.T) {
	for rule, part := range map[string]string{
		"scribble #1 fails EIO":        `"scribble" is not a kind`,
		"write":                        "does not say what happens",
		"write #0 fails EIO":           `"0" is not a number`,
		"write #5..3 fails EIO":        "ends before it begins",
		"write every fails EIO":        `"fails" is not a number`,
		"write 0% fails EIO":           "not a share",
		"write NaN% fails EIO":         "not a share",
		"write at 5 fails EIO":         "not a range",
		"write at 2M..1M fails EIO":    "ends before it begins",
		"write at 99999999T..1 lost":   "not a number of bytes",
		"write fails":                  "the error after fails is missing",
		"write fails EWHATEVER":        `"EWHATEVER" is not an error`,
		"write fails EIO today":        `"today" is too much`,
		"write sometimes fails":        `"sometimes" is neither`,
		"sync flips 3":                 "cannot happen",
		"read lost":                    "cannot happen",
		"any torn 5":                   "cannot happen",
		"write slow soon":              "not a duration",
		"write slow 48h":               "not a duration",
		"sync fails EIO; write flips":  "a number after flips is missing",
		strings.Repeat("x", 70<<10):    "at most",
		strings.Repeat("any lost;", 9): "cannot happen",
	} {
		_, err := ParseRules(rule)
		if status.Of(err) != status.Invalid || !strings.Contains(err.Error(), part) {
			t.Errorf("%.40q: %v, want %q in it", rule, err, part)
		}
	}
}

// Whatever text comes: an error, or rules that read the same when written out.
func FuzzParseRules(f *testing.F) {
	for _, s := range []string{"write #7 fails EIO", "read at 1M..2M flips 13; any 1% slow 20ms", "sync #1.. every 3 hangs", "write misdirected 8K\ndiscard lost # x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rules, err := ParseRules(text)
		if err != nil {
			if status.Of(err) != status.Invalid {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		for _, r := range rules {
			again, err := ParseRules(r.String())
			if err != nil || len(again) != 1 || again[0] != r {
				t.Fatalf("%q became %q: %v", text, r.String(), err)
			}
		}
	})
}
