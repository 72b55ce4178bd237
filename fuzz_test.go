package cairn_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// leastCorpus is how many inputs of a fuzz target are kept in the tree.
const leastCorpus = 12

// fuzzed lists every fuzz target, by package and name, with what it decodes.
// `make fuzz` finds them by itself; this list is what they are held against, so
// that a decoder of bytes from outside has one, and none is lost.
var fuzzed = map[string]string{
	"chaos/fault FuzzParse":            "scripts of faults",
	"chunk/disk FuzzParseRules":        "rules of the faulty disk",
	"chunk/server/identity FuzzRecord": "the record beside a store",
	"chunk/store FuzzBatch":            "batches of the log and their records",
	"chunk/store FuzzOpen":             "whole disks: heads, tables, roots, recovery and inspection",
	"chunk/store FuzzPage":             "saved index pages",
	"chunk/store FuzzRequests":         "requests to a store, and what is left of them after it was opened again",
	"chunk/store FuzzSuper":            "superblocks",
	"chunk/stream FuzzReader":          "streams of frames",
	"nbd FuzzNegotiation":              "options of the NBD handshake",
	"nbd FuzzReply":                    "NBD replies",
	"nbd FuzzRequest":                  "NBD requests",
	"nbd/kernel FuzzParse":             "netlink messages of the kernel's NBD driver",
	"nbd/server FuzzConnection":        "an NBD connection, handshake and transmission",
	"netplane/bird FuzzAnswers":        "answers of the routing daemon",
	"proto/wire FuzzDecode":            "frames between gateways and stores",
}

// Every fuzz target is listed, and has inputs in the tree that plain tests play.
func TestFuzzTargets(t *testing.T) {
	found := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != ".") {
			if err == nil {
				err = filepath.SkipDir
			}
			return err
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Fuzz") {
				found[filepath.ToSlash(filepath.Dir(path))+" "+fn.Name.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range found {
		if fuzzed[name] == "" {
			t.Errorf("fuzz target %q is not listed: say what it decodes", name)
		}
	}
	for name := range fuzzed {
		if !found[name] {
			t.Errorf("fuzz target %q is gone", name)
			continue
		}
		pkg, target, _ := strings.Cut(name, " ")
		inputs, err := os.ReadDir(filepath.Join(pkg, "testdata", "fuzz", target))
		if err != nil || len(inputs) < leastCorpus {
			t.Errorf("%s has %d inputs in its corpus, want %d (%v)", name, len(inputs), leastCorpus, err)
		}
	}
}
