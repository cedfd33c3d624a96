"`python -m fasterkd`: the demo"
from fasterkd.demo import main

main()
