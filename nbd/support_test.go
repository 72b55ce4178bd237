package nbd

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSupportTable: every row of docs/NBD-SUPPORT.md names tests, and every test
// it names exists.
func TestSupportTable(t *testing.T) {
	text, err := os.ReadFile("../docs/NBD-SUPPORT.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	defined := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		for _, m := range defined.FindAllStringSubmatch(string(src), -1) {
			have[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w*`)
	rules := 0
	for i, line := range strings.Split(string(text), "\n") {
		names := named.FindAllString(line, -1)
		for _, n := range names {
			if !have[n] {
				t.Errorf("line %d names %s, and there is no such test", i+1, n)
			}
		}
		cells := strings.Split(line, "|")
		if len(cells) != 6 || strings.HasPrefix(line, "|---") || strings.TrimSpace(cells[4]) == "test" {
			continue
		}
		if who := strings.TrimSpace(cells[3]); who != "S" && who != "C" && who != "S C" {
			continue // a table of another sort
		}
		rules++
		if len(names) == 0 {
			t.Errorf("line %d states a rule without a test: %s", i+1, line)
		}
	}
	if rules < 80 {
		t.Errorf("only %d rules of the protocol are listed", rules)
	}
}
