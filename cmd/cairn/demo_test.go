package main

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// The main job, as README shows it: every step of the demo succeeds.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin(t), "demo")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "nothing is left running") {
		t.Fatalf("%v\n%s", err, out)
	}
}
