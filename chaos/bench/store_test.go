package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

// Every figure of a store is measured, on a small one, and nothing is left.
func TestStoreFigures(t *testing.T) {
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN must name the cairn binary")
	}
	dir := t.TempDir()
	var out, talk bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cfg := StoreConfig{Config: Config{Bin: bin, Dir: dir, Out: &out, Talk: &talk, JSON: true, Rounds: 1, Each: 200 * time.Millisecond},
		StoreBytes: 1 << 30, Overwrites: 1, KillBytes: 64 << 20}
	if err := RunStore(ctx, cfg); err != nil {
		t.Fatalf("%v\n%s", err, talk.String())
	}
	var r StoreResult
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	want := []string{"4k random write, depth 32", "4k random write, depth 1", "4k write + flush, depth 32", "4k write + flush, depth 1",
		"4k random read, warm, depth 32", "4k random read, warm, depth 1", "4k random read, cold, depth 32", "4k random read, cold, depth 1",
		"index page", "1 MiB sequential write", "1 MiB sequential read", "write amplification", "its throughput", "its longest write", "opening 64 MiB"}
	if len(r.Figures) != len(want) {
		t.Fatalf("%d figures, want %d: %s", len(r.Figures), len(want), out.String())
	}
	for i, f := range r.Figures {
		difference := want[i] == "index page" // of two loads' processor time: on a busy machine below 0, too
		if !strings.HasPrefix(f.Name, want[i]) || f.Value <= 0 && !difference || f.Unit == "" {
			t.Errorf("figure %d is %+v, want one of %q", i, f, want[i])
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	cfg.Only = []string{"nothing"}
	if err := RunStore(ctx, cfg); err == nil || !strings.Contains(err.Error(), "sustained") {
		t.Errorf("unknown figures: %v", err)
	}
}
