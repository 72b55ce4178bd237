package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestHunt runs seeds until one fails, and says which. It is what TestPlanted
// runs with a bug planted in the production code.
func TestHunt(t *testing.T) {
	most := envInt("CAIRN_SIM_HUNT", 0)
	if most == 0 {
		t.Skip("CAIRN_SIM_HUNT is the number of seeds to try")
	}
	for seed := 1; seed <= most; seed++ {
		if r := Run(Config{Seed: uint64(seed)}); r.Failure != nil {
			fmt.Printf("found by seed %d: %s: %s\n", seed, r.Failure.Promise, r.Failure.Text)
			return
		}
	}
	fmt.Printf("not found in %d seeds\n", most)
}

// TestPlanted builds this package once for each bug of planted/ and has the
// simulator look for it: each must be found by it, and each of planted/core by the
// tests of the engine, of the metadata state or of the store: in windows so narrow that seeds do
// not meet them, those hold messages back. Nothing finds those of planted/unfound
// yet. CAIRN_SIM_PLANTED is a pattern of names ("*": all) and CAIRN_SIM_STATE a file
// of what was found before.
func TestPlanted(t *testing.T) {
	pattern := os.Getenv("CAIRN_SIM_PLANTED")
	if pattern == "" {
		t.Skip("CAIRN_SIM_PLANTED names the bugs to plant")
	}
	names := append(bugs(t, "planted", pattern), bugs(t, coreBugs, pattern)...)
	if len(names) == 0 {
		t.Fatalf("no planted bug matches %q", pattern)
	}
	state := os.Getenv("CAIRN_SIM_STATE")
	known := ""
	if b, err := os.ReadFile(state); err == nil {
		known = string(b)
	}
	for _, name := range names {
		label := strings.TrimSuffix(filepath.Base(name), ".patch")
		t.Run(label, func(t *testing.T) {
			if strings.Contains(known, label+" found") {
				t.Skip("found before")
			}
			t.Parallel()
			said := hunt(t, name)
			fmt.Printf("%-28s %s\n", label, said)
			if !strings.HasPrefix(said, "found") {
				t.Errorf("%s was not found: %s", label, said)
			} else if state != "" {
				remember(t, state, label+" "+said)
			}
		})
	}
}

// coreBugs has the bugs that the cores' own tests find, and the simulator does not.
var coreBugs = filepath.Join("planted", "core")

func bugs(t *testing.T, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern+".patch"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func remember(t *testing.T, file, line string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintln(f, line)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// hunt builds with one bug planted, looks for it, and says how it went in one
// line.
func hunt(t *testing.T, patch string) string {
	t.Helper()
	dir := t.TempDir()
	bin, overlay := filepath.Join(dir, "sim.test"), plant(t, dir, patch)
	if filepath.Dir(patch) == coreBugs {
		return coreTests(t, patch, overlay)
	}
	out, err := exec.Command("go", "test", "-c", "-o", bin, "-overlay", overlay, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("it does not build: %v\n%s", err, out)
	}
	if out := runHunter(t, bin, "TestTrapHunt", "CAIRN_SIM_TRAP="+bugName(patch)); strings.HasPrefix(out, "found") {
		return out
	}
	return runHunter(t, bin, "TestHunt", fmt.Sprintf("CAIRN_SIM_HUNT=%d", envInt("CAIRN_SIM_SEEDS", 1500)))
}

// coreTests runs the tests of the store for a bug of the store, and else those of the
// engine and of the metadata state.
func coreTests(t *testing.T, patch, overlay string) string {
	t.Helper()
	text, err := os.ReadFile(patch)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"test", "-short", "-failfast", "-overlay", overlay, "../../chunk/volume", "../../meta/state"}
	if bytes.Contains(text, []byte("--- a/chunk/store/")) {
		args = append(args[:len(args)-2], "../../chunk/store")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput()
	if _, after, ok := strings.Cut(string(out), "--- FAIL: "); ok && err != nil {
		name, _, _ := strings.Cut(after, " ")
		return "found by the core's own " + name
	}
	return "not found by the cores' own tests"
}

// bugName is a patch's name without its number.
func bugName(patch string) string {
	_, name, _ := strings.Cut(strings.TrimSuffix(filepath.Base(patch), ".patch"), "-")
	return name
}

// huntFor bounds one hunt, on a slow machine too.
const huntFor = 10 * time.Minute

func runHunter(t *testing.T, bin, test, env string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), huntFor)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "-test.run", "^"+test+"$")
	cmd.Env = append(os.Environ(), env)
	out, err := cmd.CombinedOutput()
	line, _, _ := strings.Cut(string(out), "\n")
	switch {
	case ctx.Err() != nil:
		return fmt.Sprintf("not found in %v", huntFor)
	case bytes.Contains(out, []byte("panic:")):
		return "found by a panic: " + line
	case err != nil:
		return "failed: " + err.Error() + ": " + line
	}
	return line
}

// plant applies a patch to copies and returns the overlay that go build takes.
func plant(t *testing.T, dir, patch string) string {
	t.Helper()
	b, err := os.ReadFile(patch)
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	replace := map[string]string{}
	for i, part := range strings.Split(string(b), "\n--- a/")[1:] {
		file, hunks, _ := strings.Cut(part, "\n")
		path := filepath.Join(root, file)
		src, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := applyHunks(string(src), hunks)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		replace[path] = filepath.Join(dir, fmt.Sprintf("%d.go", i))
		if err := os.WriteFile(replace[path], []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err = json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return overlay
}

// applyHunks replaces what each hunk takes away by what it adds. Places are
// found by their text: line numbers may be old.
func applyHunks(src, hunks string) (string, error) {
	for _, h := range strings.Split(hunks, "\n@@ ")[1:] {
		_, body, _ := strings.Cut(h, "\n")
		var before, after strings.Builder
		for _, l := range strings.SplitAfter(strings.TrimSuffix(body, "\n")+"\n", "\n") {
			if l == "" {
				continue
			}
			if l[0] != '+' {
				before.WriteString(l[1:])
			}
			if l[0] != '-' {
				after.WriteString(l[1:])
			}
		}
		if n := strings.Count(src, before.String()); n != 1 {
			return "", fmt.Errorf("the patch fits %d times: write it anew\n%s", n, before.String())
		}
		src = strings.Replace(src, before.String(), after.String(), 1)
	}
	return src, nil
}

// Every planted bug still fits the code it is planted in.
func TestPlantedPatchesApply(t *testing.T) {
	names := bugs(t, "planted", "*")
	if len(names) < 40 {
		t.Fatalf("%d planted bugs", len(names))
	}
	names = append(names, bugs(t, coreBugs, "*")...)
	names = append(names, bugs(t, filepath.Join("planted", "unfound"), "*")...)
	for _, n := range names {
		t.Run(bugName(n), func(t *testing.T) { plant(t, t.TempDir(), n) })
	}
}
