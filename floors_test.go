// Package cairn_test keeps the house rules of the whole module: floors, package
// comments, reasons for dependencies, names and file sizes.
//
// Duty: read every package's source and fail with one line per broken rule.
// Floor: none, nothing may import it. It does not judge behaviour.
package cairn_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"
)

const modulePath = "github.com/cairnstore/cairn"

// fileMaxLines bounds hand-written Go files; generated ones are exempt.
const fileMaxLines = 700

// floors maps each package's path inside the module to its floor. A package
// may import lower floors only. "chaos/*" stands for one level below chaos.
var floors = map[string]int{
	"cmd/cairn": 5,
	"chaos/*":   5,

	"chunk/gateway":    4,
	"placement/driver": 4,
	"vmhook/agent":     4,
	"netplane/agent":   4,
	"nbd/kernel":       4,

	"meta/server":             3,
	"meta/client":             3,
	"chunk/server":            3,
	"chunk/server/checkpoint": 3,
	"chunk/server/identity":   3,
	"chunk/client":            3,
	"chunk/backup":            3,
	"nbd/server":              3,
	"netplane/bird":           3,
	"nbd/client":              3,
	"netplane/kernel":         3,
	"vmhook/machine":          3,

	"meta/state":   2,
	"chunk/store":  2,
	"chunk/volume": 2,
	"nbd":          2,
	"placement":    2,
	"vmhook/qmp":   2,
	"netplane":     2,

	"chunk/disk":    1,
	"chunk/stream":  1,
	"nbd/socket":    1,
	"netplane/link": 1,
	"vmhook/kvm":    1,

	"proto/ids":    0,
	"proto/wire":   0,
	"proto/status": 0,
	"proto/pb":     0,
	"docs/samples": 0,
}

// reasons says why each direct third-party module, and each tool, is here.
// Keys are module paths for requirements and package paths for tools.
var reasons = map[string]string{
	"github.com/BurntSushi/toml":          "configuration files that people write by hand, with comments and clear errors",
	"github.com/anishathalye/porcupine":   "decides whether a recorded block history is linearizable; a checker of our own would need its own proof",
	"github.com/dgraph-io/ristretto/v2":   "the buffer type that Badger's writer of finished tables takes; Badger's own dependency",
	"github.com/dgraph-io/badger/v4":      "holds the metadata state: ordered keys, transactions and snapshots in pure Go",
	"github.com/hashicorp/go-hclog":       "the logger hashicorp/raft demands; adapts it to our own log",
	"github.com/hashicorp/raft":           "consensus for metadata: the part that must not be home-made",
	"github.com/hashicorp/raft-boltdb/v2": "the Raft log and vote on disk, kept by raft's own authors",
	"github.com/minio/minio-go/v7":        "the client of S3-compatible stores, where backups lie: signatures, retries, listing",
	"github.com/prometheus/client_golang": "metrics in the form that monitoring reads, written by the people who defined it",
	"github.com/pojntfx/go-nbd":           "constants and header types of the NBD protocol, in Go",
	"github.com/spf13/cobra":              "command tree, flags, usage and shell completion of the command line",
	"github.com/vbauerster/mpb/v8":        "progress bars that behave on a terminal and in a log",
	"github.com/vishvananda/netlink":      "routes, links and addresses by netlink without calling ip(8)",
	"github.com/vishvananda/netns":        "network namespaces for the storage network's tests and labs",
	"github.com/spf13/pflag":              "the flag set of cobra, named where commands share flags",
	"go.etcd.io/bbolt":                    "the errors of the file under the Raft log: a damaged one is told from one in use",
	"golang.org/x/sys":                    "system calls the standard library lacks: fallocate, RWF_NOWAIT, O_DIRECT, flock",
	"golang.org/x/term":                   "raw terminal mode for the guest console, and knowing whether there is a terminal",
	"google.golang.org/grpc":              "the control plane's transport: deadlines, TLS, streams",
	"google.golang.org/protobuf":          "the control plane's messages, versionable on disk and wire; its plugin is a tool",
	"pgregory.net/rapid":                  "property tests with shrinking for the cores",

	"google.golang.org/protobuf/cmd/protoc-gen-go":  "generates message code; pinned here so that make proto is reproducible",
	"google.golang.org/grpc/cmd/protoc-gen-go-grpc": "generates service code; pinned here so that make proto is reproducible",
	"honnef.co/go/tools/cmd/staticcheck":            "the linter of make check and make test",
}

// forbiddenNames are package names that say nothing about a duty.
var forbiddenNames = map[string]bool{"util": true, "utils": true, "common": true, "types": true, "helpers": true}

// listed is the part of `go list -json` that the rules need.
type listed struct {
	ImportPath string
	Name       string
	Dir        string
	GoFiles    []string
	Imports    []string
}

// rel is the package's path inside the module, "." for the root.
func (p listed) rel() string {
	if p.ImportPath == modulePath {
		return "."
	}
	return strings.TrimPrefix(p.ImportPath, modulePath+"/")
}

// floorOf finds a package's floor; false means the table does not know it.
func floorOf(rel string) (int, bool) {
	if f, ok := floors[rel]; ok {
		return f, true
	}
	f, ok := floors[path.Dir(rel)+"/*"]
	return f, ok
}

func top(rel string) string { return strings.SplitN(rel, "/", 2)[0] }

// importProblem says why from may not import to, or "".
func importProblem(from, to string) string {
	if top(to) == "chaos" && top(from) != "chaos" && from != "cmd/cairn" {
		return "chaos is imported by cmd/cairn and chaos only"
	}
	if top(from) == "chaos" && top(to) == "chaos" {
		return ""
	}
	ff, ok1 := floorOf(from)
	ft, ok2 := floorOf(to)
	if !ok1 || !ok2 {
		return "" // an unknown package is reported once, by itself
	}
	if ft < ff || (from == "cmd/cairn" && top(to) == "chaos") {
		return ""
	}
	if ff == 0 && ft == 0 {
		return "" // the ground is one slab: frames are made of ids and error kinds
	}
	if ft == ff && strings.HasPrefix(from, to+"/") {
		return ""
	}
	return fmt.Sprintf("F%d imports F%d; imports go down only", ff, ft)
}

func TestImportRule(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"chunk/store", "proto/wire", true},
		{"proto/wire", "proto/ids", true},
		{"chunk/store", "chunk/volume", false},
		{"chunk/server/checkpoint", "chunk/server", true},
		{"chunk/server", "chunk/server/checkpoint", false},
		{"meta/state", "meta/server", false},
		{"chaos/cluster", "chaos/check", true},
		{"chunk/gateway", "chaos/check", false},
		{"cmd/cairn", "chaos/fault", true},
	} {
		if got := importProblem(c.from, c.to); (got == "") != c.ok {
			t.Errorf("%s → %s: %q, want ok=%v", c.from, c.to, got, c.ok)
		}
	}
}

func TestFloors(t *testing.T) {
	for _, p := range packages(t) {
		rel := p.rel()
		if rel == "." {
			continue // the root holds tests only; nothing can import it
		}
		if forbiddenNames[p.Name] || forbiddenNames[path.Base(rel)] {
			t.Errorf("%s: the name %s says no duty; name the noun of the trade", rel, p.Name)
		}
		floor, ok := floorOf(rel)
		if !ok {
			t.Errorf("%s: the floor table does not know this package; give it a floor", rel)
			continue
		}
		for _, imp := range p.Imports {
			if to, in := strings.CutPrefix(imp, modulePath+"/"); in {
				if why := importProblem(rel, to); why != "" {
					t.Errorf("%s imports %s: %s", rel, to, why)
				}
			}
		}
		checkComment(t, p, floor)
	}
}

// checkComment wants exactly one package comment in the package, naming its
// floor as F0 … F5.
func checkComment(t *testing.T, p listed, floor int) {
	t.Helper()
	var comments []string
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Errorf("%s: %v", p.rel(), err)
			continue
		}
		if f.Doc != nil && !ast.IsGenerated(f) {
			comments = append(comments, f.Doc.Text())
		}
	}
	if len(p.GoFiles) == 0 {
		return // a folder of tests only
	}
	if len(comments) != 1 {
		t.Errorf("%s: %d package comments, want exactly one", p.rel(), len(comments))
		return
	}
	if !regexp.MustCompile(fmt.Sprintf(`\bF%d\b`, floor)).MatchString(comments[0]) {
		t.Errorf("%s: the package comment does not name its floor F%d", p.rel(), floor)
	}
}

func TestReasonsForDependencies(t *testing.T) {
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
		Tool []struct{ Path string }
	}
	if err := json.Unmarshal(goTool(t, "mod", "edit", "-json"), &mod); err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, r := range mod.Require {
		if !r.Indirect {
			used[r.Path] = true
		}
	}
	for _, tool := range mod.Tool {
		used[tool.Path] = true
	}
	for _, m := range keys(used) {
		if reasons[m] == "" {
			t.Errorf("%s has no written reason; add one to the table or drop the module", m)
		}
	}
	for _, m := range keys(reasons) {
		if !used[m] {
			t.Errorf("%s has a reason but is not in go.mod; drop the reason", m)
		}
	}
}

func TestFileSizes(t *testing.T) {
	err := filepath.WalkDir(".", func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != "." && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			return err
		}
		if n := bytes.Count(src, []byte("\n")); n > fileMaxLines && !ast.IsGenerated(f) {
			t.Errorf("%s has %d lines, more than %d; split it by duty", name, n, fileMaxLines)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// packages lists every package of the module.
func packages(t *testing.T) []listed {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(goTool(t, "list", "-e", "-json=ImportPath,Name,Dir,GoFiles,Imports", "./...")))
	var out []listed
	for {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
}

// goTool runs the go command at the root and returns its stdout.
func goTool(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out
}

func keys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
