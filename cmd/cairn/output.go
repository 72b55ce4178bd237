package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cairnstore/cairn/proto/ids"
)

// outputFlag is -o of every command that shows something.
type outputFlag struct{ format string }

func (o *outputFlag) register(c *cobra.Command) {
	c.Flags().StringVarP(&o.format, "output", "o", "table", "table or json")
}

// show prints rows as a table, or v as JSON.
func (o *outputFlag) show(v any, header []string, rows [][]string) error {
	switch o.format {
	case "json":
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	case "table":
		return printTable(header, rows)
	}
	return o.check()
}

// check refuses an unknown format, before a command that changes something.
func (o *outputFlag) check() error {
	if o.format != "json" && o.format != "table" {
		return usagef("-o %s is not a format: table or json", o.format)
	}
	return nil
}

func printTable(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	if len(header) > 0 {
		if _, err := fmt.Fprintln(w, strings.Join(header, "\t")); err != nil {
			return err
		}
	}
	for _, r := range rows {
		if _, err := fmt.Fprintln(w, strings.Join(r, "\t")); err != nil {
			return err
		}
	}
	return w.Flush()
}

// say talks to the person; results go to stdout alone.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func onTerminal() bool { return term.IsTerminal(int(os.Stderr.Fd())) }

var sizeUnits = []struct {
	suffix string
	shift  uint
}{{"T", 40}, {"G", 30}, {"M", 20}, {"K", 10}}

// parseSize reads 512M, 10G, 1T (binary units) or plain bytes.
func parseSize(s string) (uint64, error) {
	num, shift := strings.ToUpper(strings.TrimSpace(s)), uint(0)
	num = strings.TrimSuffix(strings.TrimSuffix(num, "B"), "I")
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(num, u.suffix); ok {
			num, shift = strings.TrimSpace(n), u.shift
			break
		}
	}
	n, err := strconv.ParseUint(num, 10, 64)
	if err != nil || n > 1<<62>>shift {
		return 0, usagef("%q is not a size: write a whole number and its unit, as in 512M, 10G or 1T", s)
	}
	return n << shift, nil
}

func formatSize(n uint64) string { return ids.FormatSize(n) }

// formatTime writes a moment with its zone, to the second.
func formatTime(ns int64) string {
	if ns == 0 {
		return "-"
	}
	return time.Unix(0, ns).Format(time.RFC3339)
}

// count writes a number of things.
func count(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
