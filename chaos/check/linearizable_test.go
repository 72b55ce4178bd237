package check

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func w(client int, v Value, from, to int64) Op {
	return Op{Client: client, Kind: Write, Value: v, InvokeNs: from, ReturnNs: to}
}

func r(client int, v Value, from, to int64) Op {
	return Op{Client: client, Kind: Read, Value: v, InvokeNs: from, ReturnNs: to}
}

func unknown(op Op) Op { op.Unknown = true; return op }

func TestLinearizable(t *testing.T) {
	for _, c := range []struct {
		name string
		ops  []Op
		says string // empty: must pass
	}{
		{"empty", nil, ""},
		{"zero before any write", []Op{r(0, 0, 1, 2)}, ""},
		{"overlapping writes, either order", []Op{w(0, 1, 1, 9), w(1, 2, 1, 9), r(2, 1, 10, 11)}, ""},
		{"read during a write sees old or new", []Op{w(0, 1, 1, 9), r(1, 0, 2, 3), r(1, 1, 4, 5)}, ""},
		{"unknown write takes effect late", []Op{unknown(w(0, 1, 1, 0)), r(1, 0, 5, 6), r(1, 1, 7, 8)}, ""},
		{"unknown write never takes effect", []Op{w(1, 2, 0, 1), unknown(w(0, 1, 2, 0)), r(1, 2, 7, 8)}, ""},
		{"unknown read says nothing", []Op{w(0, 1, 1, 2), unknown(r(1, 9, 3, 0))}, ""},
		{"stale read", []Op{w(0, 1, 1, 2), w(0, 2, 3, 4), r(1, 1, 5, 6)}, "✗ client 1 read 0.1"},
		{"lost write", []Op{w(0, 1, 1, 2), r(1, 0, 3, 4)}, "read zeroes"},
		{"new then old", []Op{w(0, 1, 1, 9), r(1, 1, 2, 3), r(1, 0, 4, 5)}, "✗ client 1 read zeroes"},
		{"unknown write flickers", []Op{unknown(w(0, 1, 1, 0)), r(1, 1, 2, 3), r(1, 0, 4, 5)}, "✗"},
		{"invented", []Op{w(0, 1, 1, 2), r(1, 7, 3, 4)}, "invented"},
		{"from the future", []Op{r(1, 1, 1, 2), w(0, 1, 3, 4)}, "✗ client 1 read 0.1"},
		{"torn", []Op{w(0, 1, 1, 2), r(1, Torn, 3, 4)}, "torn"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := NewHistory()
			for _, op := range c.ops {
				h.Add(op)
			}
			err := Linearizable(context.Background(), h)
			if c.says == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, ErrNotLinearizable) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want an account with %q", err, c.says)
			}
		})
	}
}

func TestBlocksAreIndependent(t *testing.T) {
	h := NewHistory()
	h.Add(Op{Kind: Write, Block: 1, Value: 5, InvokeNs: 1, ReturnNs: 2})
	h.Add(Op{Kind: Read, Block: 2, Value: 5, InvokeNs: 3, ReturnNs: 4})
	if err := Linearizable(context.Background(), h); err == nil || !strings.Contains(err.Error(), "block 2") {
		t.Fatalf("a misdirected write was not found: %v", err)
	}
}

func TestEndedContextIsUndecided(t *testing.T) {
	h := NewHistory()
	h.Add(w(0, 1, 1, 2))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Linearizable(ctx, h); !errors.Is(err, ErrUndecided) {
		t.Fatalf("got %v, want ErrUndecided", err)
	}
}

func TestSavedHistoryReplays(t *testing.T) {
	h := NewHistory()
	h.End(h.Begin(0, Write, 3, 1), 0)
	h.End(h.Begin(0, Read, 3, 0), 0) // a planted lost write
	h.Begin(1, Write, 3, 2)          // never answered
	name := filepath.Join(t.TempDir(), "history.json")
	if err := h.Save(name); err != nil {
		t.Fatal(err)
	}
	again, err := LoadHistory(name)
	if err != nil {
		t.Fatal(err)
	}
	if got := again.Ops(); len(got) != 3 || !got[2].Unknown {
		t.Fatalf("the saved history differs: %+v", got)
	}
	if err := Linearizable(context.Background(), again); !errors.Is(err, ErrNotLinearizable) {
		t.Fatalf("got %v, want ErrNotLinearizable", err)
	}
}
